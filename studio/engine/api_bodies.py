"""What requests to the model server may say: OpenAI's names and limits, and the studio's own."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

LONGEST_ANSWER = 131_072
MAX_COLUMNS = 8
Stop = Annotated[str, Field(max_length=256)]  # characters; each token of an answer is held against all of it


class ChatMessage(BaseModel):
    """One turn; content is text, or text parts that are joined."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str = Field(max_length=1_000_000)

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            return "\n".join(str(part.get("text", "")) for part in value)
        raise ValueError("only text parts can be read here, no images or audio")

    def plain(self) -> dict[str, str]:
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class SamplingBody(BaseModel):
    """OpenAI's names for how to answer."""

    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1, le=LONGEST_ANSWER)
    max_completion_tokens: int | None = Field(None, ge=1, le=LONGEST_ANSWER)
    seed: int | None = None
    # Names and meaning of vLLM and transformers: 0 keeps all tokens; 1 penalises nothing.
    top_k: int = Field(0, ge=-1, le=1_000_000)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)  # logits divided by less may be infinite
    stop: Stop | Annotated[list[Stop], Field(max_length=64)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class ColumnBody(BaseModel):
    """A model and the chat that it continues; the last message is the user's.

    With `continue_final_message`, as vLLM calls it, it is the assistant's, and the answer goes on from there.
    """

    model: str = Field(max_length=300)
    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> "ColumnBody":
        if self.messages[-1].role == "assistant" and not self.continue_final_message:
            raise ValueError("the last message must be the user's: an answer is not continued unless asked for")
        return self


class ChatBody(SamplingBody, ColumnBody):
    """Body of `/v1/chat/completions`. Settings of OpenAI that mean nothing here are ignored."""

    stream: bool = False
    stream_options: dict[str, Any] | None = None
    n: Literal[1] = 1
    user: str = Field("", max_length=300)


class OwnColumnBody(ColumnBody):
    """A column of a comparison; with `sampling` it is answered in its own way."""

    sampling: SamplingBody | None = None


class CompareBody(BaseModel):
    """Body of `/studio/compare`: columns, or the same messages for each of `models`."""

    columns: list[OwnColumnBody] = Field(default_factory=list, max_length=MAX_COLUMNS)
    models: list[str] = Field(default_factory=list, max_length=MAX_COLUMNS)
    messages: list[ChatMessage] = Field(default_factory=list)
    sampling: SamplingBody = Field(default_factory=SamplingBody)
    user: str = Field("", max_length=300)

    @model_validator(mode="after")
    def _fill_columns(self) -> "CompareBody":
        if not self.columns:
            self.columns = [OwnColumnBody(model=model, messages=self.messages) for model in self.models]
        if not self.columns:
            raise ValueError("give columns, or models and messages")
        return self


class AdapterBody(BaseModel):
    """Body of `/studio/adapters`; the path must lie in the project."""

    name: str
    path: str
