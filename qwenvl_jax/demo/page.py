"""The chat page: what happens when its visitors ask, stop, edit, draw a box or add a picture.

Each visitor's conversation lives in a state of their own session. A reply is one streamed request to the server; Stop
ends the request, by which the server frees its slot, and keeps what has been said.
"""

import asyncio
import contextlib
import dataclasses
import html
import logging
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from qwenvl_jax.config import UserError
from qwenvl_jax.demo.asking import SETTINGS, Settings, as_curl, as_python, request
from qwenvl_jax.demo.client import Answer, AskError, Client
from qwenvl_jax.demo.conversation import Turn, Turns, bubbles, messages, pictures_of, view
from qwenvl_jax.demo.layout import EXAMPLES, PICTURES, SCHEMA, lay_out
from qwenvl_jax.demo.pictures import MOST_PICTURES, Picture, accept, fetch
from qwenvl_jax.demo.texts import EN, ZH, Texts
from qwenvl_jax.demo.under_way import UnderWay
from qwenvl_jax.processing.boxes import corners_text

DAY = 24 * 3600  # seconds
log = logging.getLogger(__name__)
VISITORS = 40  # who get answers at one time; the server has its own limits
Update = dict[Any, Any]  # component: its new value


def build(client: Client, said: Sequence[str] = ()) -> gr.Blocks:
    """The page in English, and under /zh in Chinese, as a client of a server. Ready to launch.

    said: what is heard of the server while it loads the model; the page shows the last line.
    """
    blocks = gr.Blocks(title=EN.title, fill_width=True, delete_cache=(3600, DAY), analytics_enabled=False)
    with blocks:
        ChatPage(client, EN, blocks, said)
    with blocks.route(ZH.title, "zh", show_in_navbar=False):
        ChatPage(client, ZH, blocks, said)
    return blocks.queue(default_concurrency_limit=VISITORS)


class ChatPage:
    """The components of one page, `parts`, and what they do. Made within the context of its `blocks`."""

    def __init__(self, client: Client, texts: Texts, blocks: gr.Blocks, said: Sequence[str] = ()):
        self._client = client
        self._said = said
        self._texts = texts
        self._under_way: dict[str | None, UnderWay] = {}  # by session
        self.parts = lay_out(texts)
        self._wire(blocks)

    def _wire(self, blocks: gr.Blocks) -> None:
        parts = self.parts
        inputs: Any = {parts.turns, parts.field, *parts.settings.values()}
        shown = [parts.chat, parts.turns, parts.view, parts.status, parts.notice, parts.settings_notice, parts.field]
        shown += [parts.curl, parts.python]
        hidden: dict[str, Any] = {"api_visibility": "undocumented", "show_progress": "hidden"}
        for event, function in (
            (parts.field.submit, self.send),
            (parts.chat.retry, self.again),
            (parts.chat.edit, self.edit),
        ):
            event(function, inputs, shown, **hidden)
        parts.chat.example_select(self.example, inputs, [*shown, parts.settings["schema"]], **hidden)
        parts.chat.undo(self.undo, inputs, shown, **hidden)
        parts.chat.clear(self.clear, None, shown, **hidden)
        parts.field.stop(self.stop, None, None, queue=False, **hidden)
        parts.view.select(self.ask_inside, inputs, parts.field, queue=False, trigger_mode="always_last", **hidden)
        parts.add_camera.click(self.add_camera, {*inputs, parts.camera}, [parts.field, parts.camera], **hidden)
        added = [parts.field, parts.address, parts.address_notice]
        for event in (parts.add_address.click, parts.address.submit):
            event(self.add_address, {*inputs, parts.address}, added, **hidden)
        settings = list(parts.settings.values())
        parts.reset.click(lambda: list(dataclasses.astuple(Settings())), None, settings, queue=False, **hidden)
        known = [parts.ready, parts.poll, *settings]
        blocks.load(self.look, None, known, queue=False, **hidden)
        parts.poll.tick(self.look, None, known, queue=False, **hidden)
        blocks.unload(self.leave)

    # What visitors do, each an answer to one of Gradio's events.

    async def send(self, values: dict, visitor: gr.Request) -> AsyncIterator[Update]:
        """Answers the question in the field."""
        submitted = values[self.parts.field] or {}
        turns: Turns = values[self.parts.turns]
        try:
            turn = await asyncio.to_thread(self._turn, submitted, turns)
        except UserError as error:
            yield {self.parts.notice: _alert(str(error)), self.parts.field: submitted}
            return
        async for update in self._reply((*turns, turn), turns, values, visitor, given_back=submitted):
            yield update

    async def again(self, values: dict, visitor: gr.Request, event: gr.RetryData) -> AsyncIterator[Update]:
        """Another reply to a question; what came after it goes."""
        turns: Turns = values[self.parts.turns]
        number = _turn_number(event.index)
        if number < len(turns):
            asked = (*turns[:number], dataclasses.replace(turns[number], reply="", cut=""))
            async for update in self._reply(asked, turns, values, visitor):
                yield update

    async def edit(self, values: dict, visitor: gr.Request, event: gr.EditData) -> AsyncIterator[Update]:
        """Asks a changed question in the place of the old one, about the same pictures; what came after it goes."""
        turns: Turns = values[self.parts.turns]
        number = _turn_number(event.index)
        question = _plain(event.value)
        if number >= len(turns) or not question:
            yield {self.parts.chat: bubbles(turns), self.parts.notice: _alert(self._texts.write_a_question)}
            return
        asked = (*turns[:number], Turn(question, turns[number].pictures))
        async for update in self._reply(asked, turns, values, visitor):
            yield update

    async def example(self, values: dict, visitor: gr.Request, event: gr.SelectData) -> AsyncIterator[Update]:
        """Asks what a card says. Only its number is taken from the browser."""
        kind, names = list(EXAMPLES.items())[int(event.index)]
        pictures = tuple(self._accept(self._cached(str(PICTURES / name)), name) for name in names)
        turn = Turn(self._texts.examples[kind][1], pictures)
        schema = self.parts.settings["schema"]
        if kind == "json":
            values = {**values, schema: SCHEMA}
        async for update in self._reply((turn,), (), values, visitor):
            yield {**update, schema: values[schema]} if kind == "json" else update

    async def undo(self, values: dict, visitor: gr.Request, event: gr.UndoData) -> Update:
        """Takes a question and its reply out of the conversation; the question goes back into the field."""
        turns: Turns = values[self.parts.turns]
        number = min(_turn_number(event.index), len(turns) - 1)
        await self._abandon(visitor)
        if number < 0:
            return {self.parts.chat: []}
        field = {"text": turns[number].question, "files": [picture.path for picture in turns[number].pictures]}
        return self._kept(turns[:number]) | {self.parts.field: self._idle_field(field)}

    async def clear(self, visitor: gr.Request) -> Update:
        """A new conversation."""
        await self._abandon(visitor)
        return self._kept(()) | {self.parts.field: self._idle_field(), self.parts.status: _status("")}

    async def stop(self, visitor: gr.Request) -> None:
        """Ends the reply, which keeps what it has."""
        if run := self._under_way.get(visitor.session_hash):
            run.stopped.set()

    async def leave(self, visitor: gr.Request) -> None:
        """The visitor closed the page."""
        await self._abandon(visitor)

    async def ask_inside(self, values: dict, event: gr.EventData) -> Update:
        """Puts a box that was drawn on a picture into the question."""
        pictures = pictures_of(values[self.parts.turns])
        drawn = event._data
        if not isinstance(drawn, dict) or drawn.get("image") not in range(len(pictures)):
            return {}
        picture = pictures[drawn["image"]]
        corners = [float(corner) for corner in drawn["box"][:4]]
        box = f"<box>{corners_text(corners, (picture.width, picture.height))}</box>"
        if len(pictures) > 1:
            box = f"Picture {drawn['image'] + 1} {box}"
        field = values[self.parts.field] or {}
        text = (field.get("text") or "").strip()
        text = f"{text} {box}" if text else self._texts.inside.format(box=box)
        return {self.parts.field: {"text": text, "files": field.get("files") or []}}

    async def add_camera(self, values: dict) -> Update:
        """Puts a photo into the field."""
        photo = values[self.parts.camera]
        if photo is None:
            return {}
        return {self.parts.field: self._with_file(values, photo), self.parts.camera: None}

    async def add_address(self, values: dict) -> Update:
        """Fetches a picture into the field."""
        address = (values[self.parts.address] or "").strip()
        try:
            path = await asyncio.to_thread(self._fetch, address)
        except UserError as error:
            return {self.parts.address_notice: _alert(str(error))}
        return {
            self.parts.field: self._with_file(values, path),
            self.parts.address: "",
            self.parts.address_notice: _alert(""),
        }

    async def look(self) -> Update:
        """Whether the model is there, and what it would do if nothing were set."""
        try:
            card = await self._client.card()
        except AskError as error:
            return {self.parts.ready: _status(self._texts.error(error)), self.parts.poll: gr.Timer(active=True)}
        if card is None:
            loading = " ".join((self._texts.loading, *self._said[-1:]))
            return {self.parts.ready: _status(loading), self.parts.poll: gr.Timer(active=True)}
        update: Update = {
            self.parts.ready: _status(self._texts.ready.format(name=card.name)),
            self.parts.poll: gr.Timer(active=False),
        }
        for name, value in card.defaults.items():
            if name in self.parts.settings:
                own = self._texts.own.format(value=f"{value:g}")
                update[self.parts.settings[name]] = gr.Textbox(placeholder=own)
        return update

    # How they are answered.

    async def _reply(
        self, asked: Turns, before: Turns, values: dict, visitor: gr.Request, given_back: dict | None = None
    ) -> AsyncIterator[Update]:
        """Streams the reply to the last of the turns. Where there is none, all is as `before`, and the field, too."""
        run = UnderWay()
        previous = self._under_way.get(visitor.session_hash)
        self._under_way[visitor.session_hash] = run
        try:
            if previous is not None:
                await previous.abandon()
            async with contextlib.aclosing(self._answer(asked, before, values, run, given_back)) as updates:
                async for update in updates:
                    if run.abandoned:
                        return
                    yield update
        finally:
            run.ended.set()
            if self._under_way.get(visitor.session_hash) is run:
                del self._under_way[visitor.session_hash]

    async def _answer(
        self, asked: Turns, before: Turns, values: dict, run: UnderWay, given_back: dict | None
    ) -> AsyncGenerator[Update]:
        parts = self.parts
        yield {
            parts.chat: bubbles(asked, waiting=True),
            parts.view: view(asked),
            parts.notice: _alert(""),
            parts.settings_notice: _alert(""),
            parts.status: _status(""),
            parts.field: gr.update(submit_btn=False, stop_btn=True, **({} if given_back is None else {"value": None})),
        }
        turns, answer, error = asked, Answer(), None
        try:
            body = await self._body(asked, values)
            async with contextlib.aclosing(run.until_stopped(self._client.ask(body))) as answers:
                async for answer in answers:
                    turns = (*asked[:-1], dataclasses.replace(asked[-1], reply=answer.text))
                    yield {parts.chat: bubbles(turns, waiting=True), parts.turns: turns, parts.view: view(turns)}
        except AskError as told:
            error = told
        except UserError as told:
            error = AskError("refused", message=str(told))
        except Exception:  # the page must not stay as it is in the middle of a reply
            log.exception("a reply failed")
            error = AskError("broken")
        update: Update = {parts.field: self._idle_field()}
        if error is not None:
            in_settings = error.param.split(".")[0] in (*SETTINGS, "response_format")
            update[parts.settings_notice if in_settings else parts.notice] = _alert(self._texts.error(error))
        if error is not None and not answer.text:
            update |= self._kept(before)
            if given_back is not None:
                update[parts.field] = self._idle_field(given_back)
        else:
            cut = self._texts.broken if error else "" if answer.finish else self._texts.stopped
            turns = (*turns[:-1], dataclasses.replace(turns[-1], cut=cut))
            status = _status(self._texts.summary(answer, cut))
            update |= self._kept(turns) | {parts.status: status} | self._code(body, turns)
        yield update

    async def _body(self, asked: Turns, values: dict) -> dict[str, Any]:
        card = await self._client.card()
        if card is None:
            raise AskError("loading")
        given = {name: values[part] for name, part in self.parts.settings.items()}
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
        sent = await asyncio.to_thread(messages, asked, settings.system, settings.detail, card.ours)
        return request(card.name, sent, settings)

    def _turn(self, submitted: dict, turns: Turns) -> Turn:
        """What the field holds. Raises UserError."""
        question = (submitted.get("text") or "").strip()
        if not question:
            raise UserError(self._texts.write_a_question)
        files = submitted.get("files") or ()
        if len(files) + len(pictures_of(turns)) > MOST_PICTURES:
            raise UserError(self._texts.too_many_pictures.format(most=MOST_PICTURES))
        return Turn(question, tuple(self._accept(path) for path in files))

    def _accept(self, path: str, name: str | None = None) -> Picture:
        picture = accept(path, name)
        self.parts.field.temp_files.add(picture.path)  # what Gradio deletes after a day
        return picture

    def _fetch(self, address: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = fetch(address, Path(folder))
            accept(str(path))
            return self._cached(str(path))

    def _cached(self, path: str) -> str:
        """A copy of the file where Gradio serves it from, and deletes it after a day."""
        return self.parts.field.move_resource_to_block_cache(path) or path

    def _kept(self, turns: Turns) -> Update:
        """The page with these turns and nothing under way."""
        return {self.parts.chat: bubbles(turns), self.parts.turns: turns, self.parts.view: view(turns)}

    def _idle_field(self, value: dict | None = None) -> Update:
        changes: dict[str, Any] = {} if value is None else {"value": value}
        return gr.update(submit_btn=True, stop_btn=False, **changes)

    def _with_file(self, values: dict, path: str) -> dict:
        field = values[self.parts.field] or {}
        return {"text": field.get("text") or "", "files": [*(field.get("files") or []), path]}

    async def _abandon(self, visitor: gr.Request) -> None:
        """What is under way for this visitor is stopped, and says nothing more."""
        if run := self._under_way.get(visitor.session_hash):
            await run.abandon()

    def _code(self, body: dict, turns: Turns) -> Update:
        told = (body, pictures_of(turns), self._client.base_url, self._client.key is not None)
        return {self.parts.curl: as_curl(*told), self.parts.python: as_python(*told)}


def _turn_number(index: int | tuple[int, int] | list[int]) -> int:
    """The turn that a message belongs to: each has two."""
    return (index if isinstance(index, int) else index[0]) // 2


def _plain(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _alert(text: str) -> str:
    return f'<p role="alert">{html.escape(text)}</p>'


def _status(text: str) -> str:
    return f'<p role="status">{html.escape(text)}</p>'
