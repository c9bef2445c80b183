r"""Tools for a model that has no format of its own for them: ReAct (Yao et al. 2022), as the original's server has it.

The tools are described before the question, the model writes a thought, an action and its input, and results come back
as observations. To a client all this looks like OpenAI's tool calls, or the older function calls:

    Thought: I should look it up.\nAction: weather\nAction Input: {"city": "Oslo"}\nObservation: 3 degrees\nThought:

A thought, its action and what follows are one reply of the assistant, so the prompt after a result ends within one.
"""

import dataclasses
import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

STOP = "Observation:"  # what comes after it is not the model's to say
_CHINESE = re.compile("[\u4e00-\u9fff]")
_FINAL = "Final Answer:"


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function that the model may ask for. parameters: a JSON schema."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    readable_name: str | None = None  # of the original's own request form

    def line(self) -> str:
        """How the prompt describes it."""
        shown = self.readable_name or self.name
        return (
            f"{self.name}: Call this tool to interact with the {shown} API. What is the {shown} API useful for? "
            f"{self.description} Parameters: {json.dumps(self.parameters, ensure_ascii=False)}"
        )


@dataclasses.dataclass(frozen=True)
class Call:
    """What the model asks for; arguments is what it wrote, which need not be JSON."""

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class Turn:
    """A message: of a user (its parts), of the assistant (text and calls), or the result of a call (text)."""

    role: str
    parts: tuple[dict[str, Any], ...] = ()
    text: str = ""
    calls: tuple[tuple[str, Call], ...] = ()  # with their ids
    call_id: str | None = None


def described(tools: Sequence[Tool]) -> str:
    """What stands before a question."""
    names = ", ".join(tool.name for tool in tools)
    descriptions = "\n\n".join(tool.line() for tool in tools)
    return (
        "Answer the following questions as best you can. You have access to the following APIs:\n\n"
        f"{descriptions}\n\n"
        "Use the following format:\n\n"
        "Question: the input question you must answer\n"
        "Thought: you should always think about what to do\n"
        f"Action: the action to take, should be one of [{names}]\n"
        "Action Input: the input to the action\n"
        "Observation: the result of the action\n"
        "... (this Thought/Action/Action Input/Observation can be repeated zero or more times)\n"
        "Thought: I now know the final answer\n"
        f"{_FINAL} the final answer to the original input question\n\n"
        "Begin!\n\nQuestion: "
    )


def conversation(turns: Sequence[Turn], tools: Sequence[Tool]) -> tuple[list[dict[str, Any]], str]:
    """Messages for a processor, ending with a user's, and the text that the reply begins with.

    Raises ValueError, with the number of the turn first, for a result that answers no call.
    """
    messages: list[dict[str, Any]] = []
    chinese = False
    asked = max((number for number, turn in enumerate(turns) if turn.role == "user"), default=-1)
    number = 0
    while number < len(turns):
        turn = turns[number]
        if turn.role in ("system", "user"):
            parts = list(turn.parts)
            if number == asked and tools:
                parts.insert(0, {"type": "text", "text": described(tools)})
            messages.append({"role": turn.role, "content": parts})
            chinese = any(_CHINESE.search(part.get("text", "")) for part in turn.parts)
            number += 1
            continue
        end = next((i for i in range(number, len(turns)) if turns[i].role in ("system", "user")), len(turns))
        text = "".join(_steps(turns[number:end], number, chinese, thinks=bool(tools))).lstrip("\n")
        if end == len(turns) and turns[-1].role == "tool":
            return messages, text + "\nThought:"
        messages.append({"role": "assistant", "content": text})
        number = end
    return messages, ""


def _steps(turns: Sequence[Turn], first: int, chinese: bool, thinks: bool) -> Iterator[str]:
    """The text of assistant messages and results that follow one another; `first` is the number of the first."""
    results = _results(turns, first)
    for turn in turns:
        if turn.role == "tool":
            continue
        text = turn.text.strip("\n").rstrip()
        for call_id, call in turn.calls:
            thought = f"Thought: 我可以使用 {call.name} API。" if chinese else f"Thought: I can use {call.name}."
            yield f"\n{text or thought}\nAction: {call.name}\nAction Input: {call.arguments}"
            if call_id in results:
                yield f"\nObservation: {results[call_id]}"
            text = ""
        if not turn.calls:
            last = "我会作答了。" if chinese else "I now know the final answer."
            yield f"\nThought: {last}\n{_FINAL} {text}" if thinks else f"\n{text}"


def _results(turns: Sequence[Turn], first: int) -> dict[str, str]:
    """Results by the ids of their calls; one that names none is that of the latest."""
    results: dict[str, str] = {}
    called: list[str] = []
    for number, turn in enumerate(turns, first):
        called += [call_id for call_id, _ in turn.calls]
        if turn.role == "tool":
            call_id = called[-1] if turn.call_id is None and called else turn.call_id
            if call_id not in called:
                raise ValueError(f"{number} answers no call of the assistant before it")
            results[call_id] = turn.text
    return results


def parsed(text: str, begun: str) -> tuple[str, Call | None]:
    """A reply as what is said and what is asked for. begun: what the prompt said of the reply already."""
    whole = "\n" + text
    action, argument = whole.rfind("\nAction:"), whole.rfind("\nAction Input:")
    if 0 <= action < argument:
        name = whole[action + len("\nAction:") : argument].strip()
        arguments = whole[argument + len("\nAction Input:") :].strip()
        thought = whole[:action].strip()
        if begun and thought and not thought.startswith("Thought:"):
            thought = f"Thought: {thought}"  # the word is in the prompt
        return thought, Call(name, arguments)
    _, found, answer = whole.rpartition(f"\n{_FINAL}")
    return (answer if found else text).strip(), None


def grammar(tools: Sequence[Tool], begun: str) -> str:
    """In Lark, a reply that calls one of these tools, with arguments that its schema describes."""
    compact = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
    thought = "" if begun.endswith("Thought:") else '"Thought:" '
    calls = " | ".join(f"call{number}" for number in range(len(tools)))
    lines = [f'start: {thought}THOUGHT "\\nAction: " ({calls})', "THOUGHT: / [^\\n]{1,200}/"]
    for number, tool in enumerate(tools):
        schema = json.dumps({**tool.parameters, **compact})
        lines.append(f'call{number}: {json.dumps(tool.name)} "\\nAction Input: " %json {schema}')
    return "\n".join(lines)


def new_id() -> str:
    """The id of a call."""
    return f"call_{uuid.uuid4().hex[:24]}"
