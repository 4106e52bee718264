#!/usr/bin/env bash
# datasets 5.2.0: "webdataset" takes the fields of a data set from the first five samples of its first shard, which must agree. A field that only
# some samples have (a mask, a second picture, a score) is an error where it begins in the first five, and left out of every sample in silence
# where it begins later, read whole or streamed; one that is missing later is None.
# Output: "from sample 5 on: ValueError", "from sample 6 on: columns png, txt", "missing in sample 6: None", read whole and streamed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check datasets==5.2.0 pillow==12.3.0
cat > "$folder/look.py" <<'PYTHON'
import io
import tarfile

import datasets
from PIL import Image

datasets.disable_progress_bars()
buffer = io.BytesIO()
Image.new("RGB", (8, 8)).save(buffer, "PNG")
picture = buffer.getvalue()


def load(name, samples, streaming):
    """Samples: for each, the extensions that it has."""
    with tarfile.open(name, "w") as shard:
        for number, extensions in enumerate(samples, 1):
            for extension in extensions:
                data = picture if extension.endswith("png") else b"a caption"
                member = tarfile.TarInfo(f"{number:03d}.{extension}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    options = {"split": "train", "streaming": streaming, "cache_dir": "cache"}
    return list(datasets.load_dataset("webdataset", data_files={"train": name}, **options))


plain, masked = ["png", "txt"], ["png", "txt", "mask.png"]
for streaming in (False, True):
    print("streamed" if streaming else "whole")
    try:
        load("fifth.tar", [plain] * 4 + [masked] * 6, streaming)
        raise SystemExit("was read")
    except ValueError as error:
        print("from sample 5 on:", type(error).__name__)
    rows = load("sixth.tar", [plain] * 5 + [masked] * 5, streaming)
    columns = [name for name in rows[-1] if not name.startswith("__")]
    print("from sample 6 on: columns", ", ".join(columns))
    assert len(rows) == 10 and columns == ["png", "txt"]
    rows = load("missing.tar", [plain] * 5 + [["png"]], streaming)
    print("missing in sample 6:", rows[5]["txt"])
    assert len(rows) == 6 and rows[5]["txt"] is None
PYTHON
cd "$folder"
"$folder/venv/bin/python" -W ignore "$folder/look.py"
