#!/usr/bin/env bash
# openai 3.57.0: `timeout` is the longest wait for the next bytes and not for the answer. A server that sends six pieces of its answer
# 0.6 seconds apart takes more than 3 seconds with a timeout of 1, without an error; slow judges are never given up.
# Output: "timeout 1 s: yes, above 3 s: True".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check openai==3.57.0
cat > "$folder/look.py" <<'PYTHON'
import http.server
import json
import threading
import time

import openai

ANSWER = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}
BODY = json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [ANSWER]}).encode()


class Slow(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        piece = len(BODY) // 6 + 1
        for start in range(0, len(BODY), piece):
            time.sleep(0.6)
            self.wfile.write(BODY[start : start + piece])
            self.wfile.flush()

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{server.server_port}", max_retries=0, timeout=1.0)
start = time.monotonic()
said = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}]).choices[0].message.content
took = time.monotonic() - start
print(f"timeout 1 s: {said}, above 3 s: {took > 3}")
assert said == "yes" and took > 3
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py"
