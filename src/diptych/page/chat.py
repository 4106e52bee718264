"""The tab of conversations: words and pictures in, words or a picture out, over several turns."""

from __future__ import annotations

import secrets
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

import gradio as gr

from diptych.page.drawing import drawn
from diptych.page.events import Updates, spoken
from diptych.page.forms import asked, choose_model, filled, line
from diptych.page.shelf import Shelf, note, read_file
from diptych.serving.chat_api import FIELDS, MOST_PICTURES, Turns, chooser
from diptych.serving.errors import bad
from diptych.serving.fields import read_fields
from diptych.serving.service import Service, WriteCall

WORDS, PICTURE = "words", "a picture"
MAX_TURNS = 100


@dataclass
class Said:
    """A turn. files: paths of its pictures."""

    role: Literal["user", "assistant"]
    text: str
    files: list[str] = field(default_factory=list[str])

    def shown(self) -> dict[str, Any]:
        """As the chat shows it."""
        return {
            "role": self.role,
            "content": [*({"path": path} for path in self.files), *([self.text] if self.text else [])],
        }


class ChatTab:
    """Its parts; the conversation is kept by the server for as long as the page is open."""

    def __init__(self, service: Service, shelf: Shelf) -> None:
        self.service, self.shelf = service, shelf
        with gr.Row():
            self.model = choose_model(service, "chat-model", place=talking(service))
            self.reply = gr.Radio([WORDS, PICTURE], value=WORDS, label="Answer with", elem_id="chat-reply")
        self.chat = gr.Chatbot(label="Conversation", height=460, render_markdown=False, buttons=["copy"],
                               layout="bubble", elem_id="chat-turns", feedback_options=None,
                               placeholder="Ask about a picture, or ask for one.")  # fmt: skip
        self.status = gr.HTML(note(""), elem_id="chat-status")
        self.message = gr.MultimodalTextbox(show_label=False, file_types=["image"], file_count="multiple",
                                            sources=["upload"], placeholder="Message; Enter sends",
                                            elem_id="chat-message", label="Message")  # fmt: skip
        with gr.Row():
            self.stop = gr.Button("Stop", min_width=120)
            self.clear = gr.Button("New conversation", min_width=120)
        with gr.Accordion("Settings", open=False), gr.Row():
            self.tokens = line("Longest answer, in tokens", "256")
            self.temperature = line("Temperature", "0: the likeliest words")
            self.seed = line("Seed", "a new one")
        self.history = gr.State([])
        self._wire()

    def _wire(self) -> None:
        outputs = [self.status, self.chat, self.message, self.history]
        run = self.message.submit(
            spoken(self._say, len(outputs)),
            [self.message, self.history, self.model, self.reply, self.tokens, self.temperature, self.seed], outputs,
            api_visibility="private", show_progress="hidden", concurrency_limit=None,
        )  # fmt: skip
        self.stop.click(lambda: note("Stopped."), None, self.status, cancels=[run], api_visibility="private")
        gr.on(
            [self.clear.click, self.chat.clear], lambda: (note(""), [], None, []), None, outputs, cancels=[run],
            api_visibility="private",
        )  # fmt: skip

    async def _say(
        self, message: Any, history: list[Said], model: str, reply: str, tokens: str, temperature: str,
        seed: str,
    ) -> Updates:  # fmt: skip
        text, files = (message or {}).get("text", "").strip(), (message or {}).get("files", [])
        if not text:
            raise bad("message", "it has no words")
        if len(history) >= MAX_TURNS:
            raise bad("message", f"the conversation has {MAX_TURNS} turns; begin a new one")
        said = [*history, Said("user", text, list(files))]
        turns = Turns()
        for turn in said:
            turns.add(turn.role, turn.text, [read_file(path) for path in turn.files])
        if len(turns.pictures) > MOST_PICTURES:
            raise bad("message", f"a conversation has at most {MOST_PICTURES} pictures; begin a new one")
        shown = [turn.shown() for turn in said]
        seeded = filled({"seed": seed})

        yield note("Waiting for the model."), shown, None, gr.skip()
        if reply == PICTURE:
            call = asked(self.service, model, turns.text, seeded, images=turns.shown())
            async with aclosing(drawn(self.service, self.shelf, call)) as states:
                async for now in states:
                    if now.paths:
                        said.append(Said("assistant", now.thoughts, now.paths))
                        yield note(now.words), [turn.shown() for turn in said], gr.skip(), said
                    else:
                        yield note(now.words), gr.skip(), gr.skip(), gr.skip()
            return
        asks = read_fields(filled({"max_tokens": tokens, "temperature": temperature, **seeded}), FIELDS, form=True)
        longest = asks.get("max_tokens", 256)
        choose = chooser(asks, asks.get("seed", secrets.randbelow(1 << 31)), longest)
        call = WriteCall(
            model=model, messages=turns.messages, pictures=turns.pictures, max_new_tokens=longest, choose=choose
        )
        answer = ""
        async with aclosing(self.service.write(call)) as events:
            async for event in events:
                if event.kind == "text":
                    answer += event.value
                    yield note("Writing."), [*shown, Said("assistant", answer).shown()], gr.skip(), gr.skip()
                elif event.kind == "done":
                    said.append(Said("assistant", event.value.text))
                    cut = " It reached its longest length." if event.value.finish == "length" else ""
                    words = f"{event.value.tokens} tokens.{cut}"
                    yield note(words), [turn.shown() for turn in said], gr.skip(), said


def talking(service: Service) -> int:
    """The place of the first loaded model that answers questions and draws, else of one that answers."""
    best = 0, 0
    for place, name in enumerate(service.models.listed()):
        engine = service.models.loaded_engine(name)
        tasks = () if engine is None else engine.system.tasks
        score = 2 * ("understand" in tasks) + ("edit" in tasks)
        if score > best[0]:
            best = score, place
    return best[1]
