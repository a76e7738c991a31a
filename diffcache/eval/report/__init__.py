"""Write the record of an evaluation as one HTML file that needs no network, no fonts and no other file.

The page contains all data as JSON, and its script inserts text as text only. The content policy allows only this script
and this style, so that text from a record cannot run even if it were inserted as markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from diffcache.documents import files
from diffcache.errors import BadOption, DocumentError
from diffcache.eval.report import findings
from diffcache.eval.table import with_itself
from diffcache.text import printable

SCRIPTS = ("base", "charts", "quality", "schedules", "trajectory", "pictures", "table", "main")  # in page order


def write_html(record: Mapping[str, Any], folder_of_pictures: Path, out: Path) -> Path:
    """Write the page of a record to ``out``, and return ``out``.

    Args:
        record: A record of the format "diffcache.evaluation", version 1 or 2. The page leaves out the parts that it
            lacks.
        folder_of_pictures: The folder to which the paths of pictures in the record are relative.
        out: The file.

    Raises:
        DocumentError: If the record has another format.
        BadOption: If a picture is outside the folder, or the folder of ``out`` does not exist.
    """
    from diffcache.eval.report import pictures  # imports pillow, which a run without a report does not need

    if record.get("format") != "diffcache.evaluation" or record.get("version") not in (1, 2):
        found = f"{record.get('format')!r}, version {record.get('version')!r}"
        allowed = "a page is made of 'diffcache.evaluation', version 1 or 2"
        raise DocumentError("record", "format", f"it is {found}; {allowed}")
    if not out.absolute().parent.is_dir():
        raise BadOption("out", str(out), "a file in a folder that exists")
    shown = pictures.shown(record, folder_of_pictures)
    metric = findings.main_metric(record)
    data = {
        "record": _slim(record, shown.get("full", {})),
        "pictures": shown,
        "metric": metric,
        "sentence": findings.sentence(record, metric),
        "promises": findings.promises(record),
        "findings": [
            {"ours": f.ours["name"], "other": f.other and f.other["name"], "gain": f.gain, "clear": f.clear}
            for f in (findings.findings(record, metric) if metric else [])
        ],
    }
    return files.write(out, _page(str(record.get("title") or "Evaluation"), _shown(data)))


def _page(title: str, data: Mapping[str, Any]) -> str:
    style = _part("report.css")
    script = '"use strict";\n' + "\n".join(_part(f"{name}.js") for name in SCRIPTS)
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    filled = {
        "policy": html.escape(policy),
        "title": html.escape(printable(title)),
        "style": style,
        "record": _json(data),
        "script": script,
    }
    # The page is split and not replaced field by field, because inserted text may contain the name of a field.
    head, *rest = _part("report.html").split("{{")
    places = (part.split("}}", 1) for part in rest)
    return head + "".join(filled[name] + after for name, after in places)


def _part(name: str) -> str:
    return resources.files("diffcache.eval.report").joinpath("page", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(data: Mapping[str, Any]) -> str:
    """Return JSON that can neither end the HTML element that contains it nor open another."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _slim(record: Mapping[str, Any], samples: Mapping[str, str]) -> dict[str, Any]:
    """Return the record with the prompts and values of only those samples whose pictures are shown.

    Thousands of other samples would double the size of the page.
    """
    every = list(record.get("samples") or [])
    places = {s.get("id"): n for n, s in enumerate(every)}
    slim = dict(record)
    slim["count"] = len(every)
    slim["samples"] = [s for s in every if s.get("id") in samples]
    slim["methods"] = [{**m, "pictures": None, "scores": {}} for m in record.get("methods") or []]
    for method, kept in zip(record.get("methods") or [], slim["methods"], strict=True):
        for name, score in (method.get("scores") or {}).items():
            if score is None or with_itself(method, (record.get("metrics") or {}).get(name) or {}):
                continue
            values = score.get("values") or []
            at = {s: values[places[s]] for s in samples if places[s] < len(values)}
            kept["scores"][name] = {**score, "values": None, "at": at}
    return slim


def _shown(value: Any) -> Any:
    """Return ``value`` in a form that JSON can hold and a page can show.

    NaN and infinity become null, which the page shows as a dash. Text becomes printable.
    """
    if isinstance(value, Mapping):
        return {printable(key): _shown(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(item) for item in value]
    if isinstance(value, str):
        return printable(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
