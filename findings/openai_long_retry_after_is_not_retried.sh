#!/usr/bin/env bash
# openai 3.57.0: a 429 whose Retry-After is above 120 seconds is not retried at all, whatever max_retries says, where one of a second is
# waited for and a missing one is tried again after less than a second. A judge with a quota by the hour ends an evaluation at once.
# Output: "Retry-After 1: yes after 2 requests" and "Retry-After 500: RateLimitError after 1 requests".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check openai==3.57.0
cat > "$folder/look.py" <<'PYTHON'
import http.server
import json
import threading

import openai

ANSWER = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}
BODY = json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [ANSWER]}).encode()
requests = 0
wait = ""


class Busy(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        global requests
        requests += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b"" if requests == 1 else BODY
        self.send_response(429 if requests == 1 else 200)
        if requests == 1:
            self.send_header("Retry-After", wait)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{server.server_port}", max_retries=5)
seen = []
for wait in ("1", "500"):
    requests = 0
    try:
        made = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}])
        said = made.choices[0].message.content
    except openai.RateLimitError as error:
        said = type(error).__name__
    print(f"Retry-After {wait}: {said} after {requests} requests")
    seen.append((said, requests))
assert seen == [("yes", 2), ("RateLimitError", 1)], seen
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py"
