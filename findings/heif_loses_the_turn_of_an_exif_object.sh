#!/usr/bin/env bash
# pillow-heif 1.8.1: saved as HEIC with `exif=image.getexif()`, a photograph whose EXIF says that it is to be turned loses the turn: its
# pixels stay as they are and the tag is set to 1, so that it lies on its side for good. With the same EXIF as bytes, or with none given for a
# picture opened from a file, the file is turned as it should be.
# Output: "Exif object: (128, 64), tag 1", "bytes: (64, 128), tag 1", "not given: (64, 128), tag 1".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check pillow-heif==1.8.1 pillow==12.3.0
cat > "$folder/look.py" <<'PYTHON'
import io

import pillow_heif
from PIL import Image

pillow_heif.register_heif_opener()
exif = Image.Exif()
exif[0x0112] = 6
photograph = io.BytesIO()
Image.new("RGB", (128, 64), "red").save(photograph, "JPEG", exif=exif)
seen = {}
for name, given in {"Exif object": {"exif": exif}, "bytes": {"exif": exif.tobytes()}, "not given": {}}.items():
    written = io.BytesIO()
    Image.open(io.BytesIO(photograph.getvalue())).save(written, "HEIF", **given)
    read = Image.open(io.BytesIO(written.getvalue()))
    seen[name] = (read.size, read.getexif().get(0x0112))
    print(f"{name}: {read.size}, tag {read.getexif().get(0x0112)}")
assert seen == {"Exif object": ((128, 64), 1), "bytes": ((64, 128), 1), "not given": ((64, 128), 1)}, seen
PYTHON
cd "$folder"
"$folder/venv/bin/python" -W ignore "$folder/look.py"
