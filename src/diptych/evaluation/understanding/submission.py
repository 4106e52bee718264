"""Replies to questions whose answers are not published, as the sheet that MMBench's server takes: a row each, with
the columns of the benchmark's table, without pictures, and the reply in the column `prediction`.

Source: the sheets that VLMEvalKit writes. The format is Office Open XML's (ECMA-376, part 1), texts inside their cells.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape, quoteattr

NAME = "submission.xlsx"
PREDICTION = "prediction"
LONGEST = 32_767
"""Characters of a cell."""
MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
KIND = "application/vnd.openxmlformats-officedocument.spreadsheetml"
UNPRINTABLE = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What no XML document can hold."""


def submission(rows: Sequence[dict[str, Any]], replies: Sequence[str]) -> bytes:
    """The sheet of a table's rows with the replies to them."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "answer"))
    lines: list[list[Any]] = [[*columns, PREDICTION]]
    lines += [[*(row.get(name, "") for name in columns), reply] for row, reply in zip(rows, replies, strict=True)]
    return workbook(lines)


def workbook(lines: Sequence[Sequence[Any]]) -> bytes:
    """A file of one sheet, numbers as numbers and everything else as text."""
    cells = "".join(f"<row>{''.join(map(cell, line))}</row>" for line in lines)
    files = {
        "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{KIND}.sheet.main+xml"/>'
        f'<Override PartName="/xl/sheet1.xml" ContentType="{KIND}.worksheet+xml"/></Types>',
        "_rels/.rels": relationship(f"{OFFICE}/officeDocument", "xl/workbook.xml"),
        "xl/workbook.xml": f'<workbook xmlns="{MAIN}" xmlns:r="{OFFICE}"><sheets>'
        '<sheet name="Sheet1" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": relationship(f"{OFFICE}/worksheet", "sheet1.xml"),
        "xl/sheet1.xml": f'<worksheet xmlns="{MAIN}"><sheetData>{cells}</sheetData></worksheet>',
    }
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            entry = zipfile.ZipInfo(name)  # with a fixed date: the same replies give the same file
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n{text}')
    return packed.getvalue()


def relationship(kind: str, target: str) -> str:
    inner = f"<Relationship Id={quoteattr('r1')} Type={quoteattr(kind)} Target={quoteattr(target)}/>"
    return f'<Relationships xmlns="{PACKAGE}/relationships">{inner}</Relationships>'


def cell(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"<c><v>{value}</v></c>"
    text = escape(UNPRINTABLE.sub("", str(value))[:LONGEST])
    return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'
