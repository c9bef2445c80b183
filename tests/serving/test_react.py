"""Tools in ReAct's form: what the model reads of a conversation with calls, and what is read of its replies."""

import json

import pytest
from llguidance import LLMatcher

from qwenvl_jax.serving.react import Call, Tool, Turn, conversation, described, grammar, parsed

WEATHER = Tool("weather", "Tells the weather.", {"type": "object", "properties": {"city": {"type": "string"}}})
CLOCK = Tool("clock", "Tells the time.", {"type": "object", "properties": {}}, readable_name="World Clock")


def user(text: str) -> Turn:
    return Turn("user", ({"type": "text", "text": text},))


def called(call_id: str, name: str, arguments: str, text: str = "") -> Turn:
    return Turn("assistant", text=text, calls=((call_id, Call(name, arguments)),))


def test_tools_are_described_before_the_last_question():
    turns = [
        Turn("system", ({"type": "text", "text": "Be brief."},)),
        user("Hi"),
        Turn("assistant", text="Hello"),
        user("Cold?"),
    ]
    messages, begun = conversation(turns, [WEATHER, CLOCK])
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[1]["content"] == [{"type": "text", "text": "Hi"}]
    assert messages[2]["content"] == "Thought: I now know the final answer.\nFinal Answer: Hello"
    first, question = messages[3]["content"]
    assert first["text"] == described([WEATHER, CLOCK])
    assert question == {"type": "text", "text": "Cold?"}
    assert begun == ""


def test_the_description():
    text = described([WEATHER, CLOCK])
    assert text.startswith("Answer the following questions as best you can. You have access to the following APIs:\n\n")
    assert (
        "weather: Call this tool to interact with the weather API. What is the weather API useful for? "
        'Tells the weather. Parameters: {"type": "object", "properties": {"city": {"type": "string"}}}\n\n'
        "clock: Call this tool to interact with the World Clock API."
    ) in text
    assert "should be one of [weather, clock]\n" in text
    assert text.endswith("Begin!\n\nQuestion: ")


def test_after_a_result_the_reply_goes_on():
    turns = [
        user("Cold in Oslo?"),
        called("a", "weather", '{"city": "Oslo"}'),
        Turn("tool", text="3 degrees", call_id="a"),
    ]
    messages, begun = conversation(turns, [WEATHER])
    assert len(messages) == 1
    assert begun == (
        'Thought: I can use weather.\nAction: weather\nAction Input: {"city": "Oslo"}\nObservation: 3 degrees\nThought:'
    )


def test_two_calls_at_once_and_an_answer_are_one_reply():
    both = Turn("assistant", text="Thought: both", calls=(("a", Call("weather", "{}")), ("b", Call("clock", "{}"))))
    turns = [
        *(user("冷吗？"), both, Turn("tool", text="noon", call_id="b"), Turn("tool", text="3", call_id="a")),
        *(Turn("assistant", text="Cold at noon."), user("Thanks")),
    ]
    messages, begun = conversation(turns, [WEATHER, CLOCK])
    assert messages[1]["content"] == (
        "Thought: both\nAction: weather\nAction Input: {}\nObservation: 3\n"
        "Thought: 我可以使用 clock API。\nAction: clock\nAction Input: {}\nObservation: noon\n"
        "Thought: 我会作答了。\nFinal Answer: Cold at noon."
    )
    assert begun == ""


def test_a_result_without_an_id_is_that_of_the_latest_call():
    turns = [user("?"), called("x", "clock", "{}"), Turn("tool", text="noon")]
    assert "Observation: noon" in conversation(turns, [CLOCK])[1]


@pytest.mark.parametrize("turn", [Turn("tool", text="3", call_id="other"), Turn("tool", text="3")])
def test_a_result_that_answers_nothing(turn):
    turns = [user("?"), Turn("assistant", text="?"), turn]
    with pytest.raises(ValueError, match="^2 answers no call"):
        conversation(turns, [CLOCK])


@pytest.mark.parametrize(
    ("text", "begun", "content", "call"),
    [
        ("plain", "", "plain", None),
        ("Thought: x\nFinal Answer: 3", "", "3", None),
        (" x.\nFinal Answer: Final Answer: 3\n", "... Thought:", "Final Answer: 3", None),
        ('Thought: x\nAction: f\nAction Input: {"a": 1}\n', "", "Thought: x", Call("f", '{"a": 1}')),
        (" x\nAction: f\nAction Input: 1", "... Thought:", "Thought: x", Call("f", "1")),
        ("Action: f\nAction Input:", "", "", Call("f", "")),
        ("Thought: x\nAction Input: 1\nAction: f", "", "Thought: x\nAction Input: 1\nAction: f", None),
    ],
)
def test_replies(text, begun, content, call):
    assert parsed(text, begun) == (content, call)


def test_a_call_is_read_as_it_was_written():
    """What a client sends back of a reply gives the prompt that the model had written."""
    text = 'Thought: look it up\nAction: weather\nAction Input: {"city": "Oslo"}'
    content, call = parsed(text, "")
    turns = [user("?"), called("a", call.name, call.arguments, content), Turn("tool", text="3", call_id="a")]
    assert conversation(turns, [WEATHER])[1].startswith(text)


@pytest.mark.parametrize("begun", ["", "Observation: 3\nThought:"])
def test_the_grammar_of_a_call(begun):
    made = LLMatcher.grammar_from_lark(grammar([WEATHER, CLOCK], begun))
    assert not LLMatcher.validate_grammar(made)
    assert json.dumps("weather") in made
