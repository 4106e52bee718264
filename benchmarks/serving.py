"""Speed and load of `diptych serve` over loopback; ratios are of one run.

python benchmarks/serving.py            # everything, a few minutes
python benchmarks/serving.py batching   # or: cache, overhead, load, kill
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
from PIL import Image

import diptych

PROMPTS = ["a red circle left of a blue square", "three green crosses", "a yellow triangle above a red cross"]
PARTS = ("batching", "cache", "overhead", "load", "kill")


class Server:
    """A server process on a free port."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "diptych", "serve", *arguments, "--port", "0", "--device", "cpu"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().rpartition(":")[2])

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def post(
        self, path: str, body: bytes, kind: str = "application/json", leave: float | None = None
    ) -> tuple[int, bytes]:
        """The answer; (0, b"") for a client that leaves after so many seconds."""
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            line.request("POST", path, body, {"Content-Type": kind})
            if leave is not None:
                time.sleep(leave)
                return 0, b""
            answer = line.getresponse()
            return answer.status, answer.read()
        finally:
            line.close()

    def draw(self, **fields: Any) -> dict[str, Any]:
        status, data = self.post("/v1/images/generations", json.dumps(fields).encode())
        assert status == 200, data
        return json.loads(data)

    def memory(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def computing(self) -> float:
        """Seconds that the engine has spent on requests."""
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        line.request("GET", "/metrics")
        text = line.getresponse().read().decode()
        line.close()
        names = [f'diptych_phase_seconds_total{{phase="{name}"}} ' for name in ("prepare", "draw", "write")]
        return sum(float(row.split()[-1]) for row in text.splitlines() if row.startswith(tuple(names)))

    def spent(self) -> float:
        """Seconds of CPU of the process."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def answering(self) -> float:
        """Seconds of CPU of the thread that reads requests and answers them."""
        process = psutil.Process(self.process.pid)
        return next(each.user_time + each.system_time for each in process.threads() if each.id == process.pid)


def batching(rounds: int = 4) -> dict[str, float]:
    """16 requests, 25 steps with guidance, at once: to a server that batches and to one that does not, in turns.

    s: of wall clock, at the median; cpu s: of the server's processor time, which other programs hardly change.
    """

    def fields(place: int) -> dict[str, Any]:
        return {"prompt": PROMPTS[place % 3], "seed": place, "num_inference_steps": 25, "guidance_scale": 4.0,
                "think": False}  # fmt: skip

    plain = "toy/iomm", "--no-cache", "--no-page", "--no-tools"
    wall: dict[str, list[float]] = {"on": [], "off": []}
    cpu: dict[str, list[float]] = {"on": [], "off": []}
    with Server(*plain) as on, Server(*plain, "--no-batching") as off, ThreadPoolExecutor(16) as pool:
        for number in range(rounds + 1):
            for name, server in (("on", on), ("off", off)):
                begun, spent = time.monotonic(), server.spent()
                list(pool.map(lambda place, server=server: server.draw(**fields(place)), range(16)))
                if number:  # the first round warms up
                    wall[name].append(time.monotonic() - begun)
                    cpu[name].append(server.spent() - spent)
        first = sorted(pool.map(lambda place: first_partial(on, fields(place)), range(16)))
    seconds = {f"{name} s": statistics.median(values) for name, values in wall.items()}
    spent_seconds = {f"{name} cpu s": statistics.median(values) for name, values in cpu.items()}
    return {
        **seconds, **spent_seconds, "ratio": seconds["off s"] / seconds["on s"],
        "cpu ratio": spent_seconds["off cpu s"] / spent_seconds["on cpu s"], "first partial, p95 s": first[15],
    }  # fmt: skip


def first_partial(server: Server, fields: dict[str, Any]) -> float:
    """Seconds to the first estimate of a stream."""
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    begun = time.monotonic()
    body = json.dumps({**fields, "stream": True, "partial_images": 3})
    line.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
    answer = line.getresponse()
    answer.readline()
    taken = time.monotonic() - begun
    answer.read()
    line.close()
    return taken


def cache() -> dict[str, float]:
    """The same request, with and without the cache's answer; medians."""
    with Server("toy/iomm") as server:
        server.draw(prompt=PROMPTS[0], seed=1)
        made, repeated = [], []
        for seed in range(2, 12):
            for times in (made, repeated):
                begun = time.monotonic()
                server.draw(prompt=PROMPTS[0], seed=seed)
                times.append(time.monotonic() - begun)
    one, two = statistics.median(made), statistics.median(repeated)
    return {"made ms": 1e3 * one, "repeated ms": 1e3 * two, "ratio": one / two}


def overhead(count: int = 60) -> dict[str, float]:
    """What a small request takes beside the engine, in turns with the same picture by the engine alone.

    outside: the whole less the engine's phases (prepare, draw, write), over one connection that stays open. more than
    alone: the whole less a call of the model in this process. cpu: of the server's thread that reads and answers.
    """
    engine = diptych.load("toy/iomm", device="cpu")
    small = {"num_inference_steps": 2, "think": False}
    whole, outside, alone = list[float](), list[float](), list[float]()
    with Server("toy/iomm", "--no-cache", "--no-page", "--no-tools") as server:
        line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
        spent = 0.0
        for seed in range(count + 5):
            if seed == 5:  # the first ones warm up
                spent = server.answering()
                whole, outside, alone = [], [], []
            before, begun = server.computing(), time.perf_counter()
            fields = {"prompt": PROMPTS[0], "seed": seed, **small}
            line.request("POST", "/v1/images/generations", json.dumps(fields), {"Content-Type": "application/json"})
            data = json.loads(line.getresponse().read())
            whole.append(1e3 * (time.perf_counter() - begun))
            outside.append(whole[-1] - 1e3 * (server.computing() - before))
            begun = time.perf_counter()
            image = engine.generate(PROMPTS[0], seed=[seed], steps=2, prompt_expansion=0)[0]
            alone.append(1e3 * (time.perf_counter() - begun))
            made = Image.open(io.BytesIO(base64.b64decode(data["data"][0]["b64_json"])))
            assert np.abs(np.asarray(made).astype(int) - np.asarray(image)).max() <= 1
        # Each request stands between two looks at the metrics, which this thread answers too.
        looks = [server.answering()]
        for _ in range(2 * count):
            server.computing()
        looks.append(server.answering())
        line.close()
    medians = {name: statistics.median(values) for name, values in
               (("whole", whole), ("engine alone", alone), ("outside", outside))}  # fmt: skip
    medians["more than alone"] = statistics.median(a - b for a, b in zip(whole, alone, strict=True))
    cpu = 1e3 * ((looks[0] - spent) - (looks[1] - looks[0])) / count
    return {**{f"{name} ms": value for name, value in medians.items()}, "cpu outside ms": cpu}


def load(count: int, clients: int) -> dict[str, float]:
    """Mixed requests from many clients, each result compared with that of the model alone."""
    iomm, ovis = diptych.load("toy/iomm", device="cpu"), diptych.load("toy/ovis-u1", device="cpu")
    source = iomm.generate(PROMPTS[0], seed=[1], steps=4)[0]
    out = io.BytesIO()
    source.save(out, "PNG")
    png = out.getvalue()
    url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    drawn = {
        (text, seed): np.asarray(iomm.generate(text, seed=[seed], steps=4, prompt_expansion=0)[0]).astype(int)
        for text in PROMPTS
        for seed in range(5)
    }
    edited = {
        seed: np.asarray(ovis.edit(source, "make the background navy", seed=[seed], steps=3, prompt_expansion=0)[0])
        for seed in range(4)
    }
    questions = ["what color is the circle?", "how many circles are there?"]
    answers = {text: ovis.ask(source, text) for text in questions}
    said = {text: ovis.ask(None, text) for text in questions}
    counts: dict[str, int] = {}
    wrong: list[str] = []
    lock = threading.Lock()

    def picture(data: bytes) -> np.ndarray:
        row = json.loads(data)["data"][0]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(row["b64_json"])))).astype(int)

    def one(place: int) -> None:
        choose = random.Random(place)
        kind = choose.choices(["generate", "edit", "ask", "chat", "cancelled", "malformed"], [4, 2, 3, 2, 1, 1])[0]
        good = True
        if kind == "generate":
            text, seed = choose.choice(PROMPTS), choose.randrange(5)
            body = {"model": "toy/iomm", "prompt": text, "seed": seed, "num_inference_steps": 4, "think": False}
            status, data = server.post("/v1/images/generations", json.dumps(body).encode())
            good = status == 200 and np.abs(picture(data) - drawn[text, seed]).max() <= 1
        elif kind == "edit":
            seed = choose.randrange(4)
            texts = {"model": "toy/ovis-u1", "prompt": "make the background navy", "seed": str(seed),
                     "num_inference_steps": "3", "think": "false"}  # fmt: skip
            from diptych.serving.client import form

            body, content = form(texts, [("image", png)])
            status, data = server.post("/v1/images/edits", body, content)
            good = status == 200 and np.abs(picture(data) - edited[seed].astype(int)).max() <= 1
        elif kind in ("ask", "chat"):
            text = choose.choice(questions)
            parts = [{"type": "text", "text": text}]
            if kind == "ask":
                parts = [{"type": "image_url", "image_url": {"url": url}}, *parts]  # type: ignore[list-item]
            turns = {"model": "toy/ovis-u1", "messages": [{"role": "user", "content": parts}], "max_tokens": 64}
            status, data = server.post("/v1/chat/completions", json.dumps(turns).encode())
            wanted = (answers if kind == "ask" else said)[text]
            good = status == 200 and json.loads(data)["choices"][0]["message"]["content"] == wanted
        elif kind == "cancelled":
            body = {"model": "toy/iomm", "prompt": "a circle", "num_inference_steps": 500, "n": 2}
            server.post("/v1/images/generations", json.dumps(body).encode(), leave=0.05)
        else:
            body = choose.choice(
                [b"{", b'{"prompt": ""}', b'{"prompt": "a", "n": 99}', b'{"prompt": "a", "size": "7x7"}']
            )
            status, data = server.post("/v1/images/generations", body)
            good = status == 400 and "error" in json.loads(data)
        with lock:
            counts[kind] = counts.get(kind, 0) + 1
            if not good:
                wrong.append(f"{kind} {place}")

    with Server("toy/iomm", "toy/ovis-u1", "--no-cache") as server, ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(50)))
        before, begun = server.memory(), time.monotonic()
        list(pool.map(one, range(50, count)))
        taken, after = time.monotonic() - begun, server.memory()
    print(f"wrong: {wrong[:10] or 'none'}; {counts}", file=sys.stderr)
    return {
        "requests": count, "wrong": len(wrong), "requests a second": (count - 50) / taken, "memory after 50 MB": before,
        "memory at the end MB": after, "growth %": 100 * (after / before - 1),
    }  # fmt: skip


def kill() -> dict[str, float]:
    """A server that is killed while it draws, and one that is started again: the same picture."""
    fields = {"prompt": PROMPTS[0], "seed": 3, "num_inference_steps": 60}
    with Server("toy/iomm") as server, ThreadPoolExecutor(4) as pool:
        wanted = server.draw(**fields)["data"][0]["b64_json"]
        broken = [pool.submit(server.post, "/v1/images/generations", json.dumps({**fields, "seed": s}).encode())
                  for s in range(10, 14)]  # fmt: skip
        time.sleep(0.3)
        os.kill(server.process.pid, signal.SIGKILL)
        failed = sum(each.exception() is not None for each in broken)
    begun = time.monotonic()
    with Server("toy/iomm") as server:
        started = time.monotonic() - begun
        same = server.draw(**fields)["data"][0]["b64_json"] == wanted
    return {"requests that broke off": failed, "seconds to start again": started, "same picture": float(same)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which; all when not given")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=50)
    args = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    for name in args.parts or PARTS:
        made = {"batching": batching, "cache": cache, "overhead": overhead, "kill": kill}
        results[name] = load(args.requests, args.clients) if name == "load" else made[name]()
        print(name, ", ".join(f"{key} {value:.4g}" for key, value in results[name].items()), flush=True)
    print(json.dumps({**results, "cores": psutil.cpu_count(), "load average": psutil.getloadavg()[0]}))


if __name__ == "__main__":
    main()
