"""A conversation with tools in one of the two protocols; the shell and the page hold the same."""

from collections.abc import Callable, Collection, Iterator, Sequence

from studio.agent import moss, react
from studio.agent.steps import Ask, Limits, Message, Step, Watch
from studio.agent.tools import pick_tools
from studio.errors import StudioError

PROTOCOLS = ("react", "moss")


class Session:
    """`tools` are names (calculate, solve, search); `system` stands before ReAct's own text. Raises StudioError."""

    def __init__(
        self,
        ask: Ask,
        tools: Collection[str],
        protocol: str = "react",
        *,
        system: str = "",
        bot_name: str = "MOSS",
        limits: Limits | None = None,
    ) -> None:
        if protocol not in PROTOCOLS:
            raise StudioError(f"There is no protocol {protocol!r}.", f"Allowed: {', '.join(PROTOCOLS)}.")
        self._ask, self._limits = ask, limits
        self._run: Callable[..., Iterator[Step]] = moss.moss if protocol == "moss" else react.react
        self._tools = pick_tools(tools, moss.DECIMALS if protocol == "moss" else None)
        text = moss.system_text(self._tools, bot_name) if protocol == "moss" else react.system_text(self._tools, system)
        self._system: Message = {"role": "system", "content": text}
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self._messages: list[Message] = [self._system]

    def answer(
        self, question: str, stops: Sequence[str] = (), stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[Step]:
        """What happens until the question is answered, step by step. The conversation goes on from the last step."""
        chat = [*self._messages, {"role": "user", "content": question}]
        for step in self._run(Watch(self._ask, self._limits, stopped), self._tools, chat, stops):
            self._messages = step.messages or self._messages
            yield step
