"""A whole call of a tool on the page: a script speaks for the model, the loop and the calculator are the real ones."""

import subprocess

import pytest
from playwright.sync_api import expect

from studio.agent.steps import Limits
from studio.projects import create_project
from tests.browser import workspace
from tests.browser.conftest import Visitor
from tests.pages.model_server import ModelServer

pytestmark = pytest.mark.browser
CALL = "Thought: I multiply.\nAction: Calculate\nAction Input: {'expression': '17*25'}\n"
ANSWER = "Thought: I know it now.\nFinal Answer: 17 times 25 is 425."


class Agent(ModelServer):
    """Calls the calculator, and answers once it has the result; asked about loops, it never stops calling."""

    def events(self, num_columns: int):
        messages = self.asked[-1]["columns"][0]["messages"]
        is_done = messages[-1]["content"].startswith("Response:") and not any("loop" in m["content"] for m in messages)
        yield {"column": 0, "weights": "abc"}
        yield {"column": 0, "delta": ANSWER if is_done else CALL}
        yield {"column": 0, "finish_reason": "stop", "num_tokens": 5, "seconds": 0.5}


def test_a_tool_is_called_on_the_page_and_calls_come_to_an_end(
    visitor: Visitor, owner: subprocess.Popen[bytes]
) -> None:
    project = create_project("Agents")
    agent = Agent()
    try:
        workspace.serve(project, agent, owner)
        page = visitor.open(f"/Compare?project={project.slug}")
        page.get_by_role("radio", name="With tools").click()
        question = page.get_by_placeholder("Ask with tools")
        question.fill("How much is 17 times 25?")
        question.press("Enter")
        expect(page.get_by_text("17 times 25 is 425.")).to_be_visible()
        step = page.get_by_test_id("stExpander").filter(has_text="Calculate")
        step.locator("summary").click()
        for text in ("Thought: I multiply.", "17*25", "425"):
            expect(step.get_by_text(text, exact=True).last).to_be_visible()
        expect(page.get_by_text("I know it now.")).to_be_visible()

        question.fill("Now loop")
        question.press("Enter")
        expect(page.get_by_text(f"{Limits.max_steps} calls of tools are allowed")).to_be_visible()
        assert len(agent.asked) == 2 + Limits.max_steps
    finally:
        agent.close()
