"""The table of bad inputs of `hpcserve batch`: what is said in full, with which exit status, and that nothing
was written, changed or started."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hpcserve.batch.begin import BatchRequest, Model, begin
from hpcserve.batch.layout import BatchDir
from hpcserve.errors import StorageError

from .conftest import World
from .jobs import becomes_ready, secret, submit
from .test_local_launch import processes_of

MODEL = "model: org/tiny\nengine: fake\ndevice: cpu\naggregated: {}\n"
TEMPLATE = "Tell me about {{ q }}\n"
LONG = "Read this, and then answer. " * 5
ROWS = "".join(json.dumps({"q": f"question {number}"}) + "\n" for number in range(5))
Given = Callable[[World], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """One row: what is wrong, and what must come of it."""

    what: str
    status: int
    says: str
    """The whole message; `~` is the home, and what `…` ends may go on."""
    hint: str
    """The whole hint, likewise."""
    args: tuple[str, ...] = ()
    """Behind `hpcserve batch`."""
    given: Given | None = None
    """Prepares the world."""
    files: Mapping[str, str | bytes] = field(default_factory=dict)


def batch(
    data: str | tuple[str, ...] = "data.jsonl", *flags: str, prompt: tuple[str, ...] = ("--template", "t.j2")
) -> tuple[str, ...]:
    files = (data,) if isinstance(data, str) else data
    return ("model.yaml", *files, "-o", "out", *prompt, *flags)


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def openai(name: str, **members: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "hello"}]}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body, **members}


def planned(world: World, template: str = TEMPLATE) -> BatchDir:
    """A batch that the plain command goes on with."""
    request = BatchRequest(inputs=("data.jsonl",), output=Path("out"), template=template)
    return begin(request, Model(served_name="tiny", path="org/tiny", revision=None)).directory


def rewritten(change: Callable[[str], str]) -> Given:
    """The manifest of a planned batch is another text now."""

    def rewrite(world: World) -> None:
        manifest = planned(world).manifest
        manifest.write_text(change(manifest.read_text()))

    return rewrite


def of_format_9(text: str) -> str:
    return json.dumps({"format": 9, "version": "7.0", "asked": "something new"})


def fails(name: str, number: int) -> Given:
    """The operating system refuses this call from now on."""

    def refuse(what: Any, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), None if isinstance(what, int) else str(what))

    return lambda world: world.monkeypatch.setattr(os, name, refuse)


def without(package: str) -> Given:
    """It is not installed."""

    def hide(world: World) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            world.monkeypatch.delitem(sys.modules, name)
        world.monkeypatch.setitem(sys.modules, package, None)

    return hide


def serves(world: World) -> None:
    submit(world, job=becomes_ready(key_file="~"))


def key_unreadable(world: World) -> None:
    path = world.runs / "eval" / "secrets" / "api-key"
    submit(world, job=becomes_ready(key_file=str(path)))
    assert secret(world, "api-key")
    path.unlink()


def parquet(table: Mapping[str, list[Any]], name: str = "data.parquet") -> Given:
    def write(world: World) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(dict(table)), world.home / name)

    return write


def both(*given: Given) -> Given:
    def all_of(world: World) -> None:
        for one in given:
            one(world)

    return all_of


def on(site: str) -> Given:
    return lambda world: world.monkeypatch.setenv("HPCSERVE_SITE", site)


TABLE = [
    Bad(
        what="no argument at all",
        args=(),
        status=2,
        says="the following arguments are required: model.yaml DATA, -o/--output",
        hint="see `hpcserve batch --help`",
    ),
    Bad(
        what="no -o",
        args=("model.yaml", "data.jsonl"),
        status=2,
        says="the following arguments are required: -o/--output",
        hint="see `hpcserve batch --help`",
    ),
    Bad(
        what="no model.yaml",
        args=("data.jsonl", "more.jsonl", "-o", "out"),
        status=2,
        says="a batch needs a model.yaml and a dataset",
        hint="`hpcserve batch model.yaml data.jsonl -o out/`, or --endpoint RUN without a model.yaml",
    ),
    Bad(
        what="no dataset",
        args=("model.yaml", "-o", "out"),
        status=2,
        says="a batch needs a model.yaml and a dataset",
        hint="`hpcserve batch model.yaml data.jsonl -o out/`, or --endpoint RUN without a model.yaml",
    ),
    Bad(
        what="a model.yaml that is missing",
        args=("mdel.yaml", "data.jsonl", "-o", "out", "--template", "t.j2"),
        status=3,
        says="mdel.yaml: there is no such file (model.yaml)",
        hint="The least one is a line `model: ORG/NAME`, or `model: /a/directory/with/its/weights`.",
    ),
    Bad(
        what="a model that the site can't place",
        args=batch(),
        files={"model.yaml": "model: org/tiny\ndevice: cuda\n"},
        status=4,
        says="device is cuda, but the nodes of site local have no GPU",
        hint="use `device: cpu`, or another `--site`",
    ),
    Bad(
        what="a misspelled flag",
        args=batch("data.jsonl", "--sampels", "3"),
        status=2,
        says="`hpcserve batch` has no option '--sampels'",
        hint="did you mean `--samples`?",
    ),
    Bad(
        what="a file that is missing",
        args=batch("dat.jsonl"),
        status=3,
        says="dat.jsonl: there is no such file or directory",
        hint="Did you mean 'data.jsonl'?",
    ),
    Bad(
        what="a pattern that matches nothing",
        args=batch("part-*.jsonl"),
        status=3,
        says="no file matches 'part-*.jsonl'",
        hint="In '.' there are: data.jsonl, model.yaml, t.j2.",
    ),
    Bad(
        what="an empty file",
        args=batch(),
        files={"data.jsonl": ""},
        status=3,
        says="data.jsonl: the file is empty",
        hint="Leave it out, or make it again.",
    ),
    Bad(
        what="a file of blank lines",
        args=batch(),
        files={"data.jsonl": "\n\n"},
        status=3,
        says="data.jsonl: the file has no rows",
        hint="Leave it out, or make it again.",
    ),
    Bad(
        what="a file named twice",
        args=batch(("data.jsonl", "d*.jsonl")),
        status=3,
        says="data.jsonl: named twice, by 'data.jsonl' and by 'd*.jsonl'",
        hint="Name it once; more answers to a row are more samples.",
    ),
    Bad(
        what="a broken line",
        args=batch(),
        files={"data.jsonl": '{"q": 1}\n{"q": \n{"q": 2}\n'},
        status=3,
        says="data.jsonl:2: broken JSON: Expecting value (column 1)",
        hint="Correct the line.",
    ),
    Bad(
        what="a line cut off",
        args=batch(),
        files={"data.jsonl": '{"q": 1}\n{"q": "cut'},
        status=3,
        says="data.jsonl:2: broken JSON: Unterminated string starting at (column 7)",
        hint="The file ends with this line; was it cut off?",
    ),
    Bad(
        what="a line that is no object",
        args=batch(),
        files={"data.jsonl": '{"q": 1}\n["q"]\n'},
        status=3,
        says="data.jsonl:2: the line must be a JSON object, not an array",
        hint="Write one object a line; `jq -c '.[]'` makes lines of an array.",
    ),
    Bad(
        what="plain rows among OpenAI lines",
        args=batch(prompt=()),
        files={"data.jsonl": lines(openai("a"), {"q": 1})},
        status=3,
        says="data.jsonl:2: no OpenAI batch line, but data.jsonl:1 is one",
        hint="Such a line has custom_id, method, url and body. Run requests and plain rows apart.",
    ),
    Bad(
        what="a custom_id that is there twice",
        args=batch(prompt=()),
        files={"data.jsonl": lines(openai("a"), openai("b"), openai("a"))},
        status=3,
        says="data.jsonl:3: custom_id 'a' is that of data.jsonl:1",
        hint="Answers are found by custom_id, so each must be there once.",
    ),
    Bad(
        what="an OpenAI line of a path that is not served",
        args=batch(prompt=()),
        files={"data.jsonl": lines(openai("a"), openai("b", url="/v1/images"))},
        status=3,
        says=(
            "rows that can't be rendered:\n"
            "  data.jsonl:2: url must be one of /v1/chat/completions, /v1/completions,"
            ' /v1/embeddings, /v1/score, /v1/rerank, /v1/responses, not "/v1/images"'
        ),
        hint="mend the rows or the template; nothing was sent",
    ),
    Bad(
        what="a suffix that nobody knows",
        args=batch("data.parqet"),
        files={"data.parqet": "x"},
        status=3,
        says=(
            "data.parqet: the suffix .parqet is unknown; allowed: .jsonl, .ndjson, .json, .csv,"
            " .tsv, .parquet, .pq, .arrow, .feather, .ipc; those of text also with .gz or .zst"
        ),
        hint="Did you mean '.parquet'?",
    ),
    Bad(
        what="a gz that is cut off",
        args=batch("data.jsonl.gz"),
        files={"data.jsonl.gz": gzip.compress((ROWS * 1000).encode())[:-40]},
        status=3,
        says="data.jsonl.gz: cut off after line …",
        hint="Copy or make the file again.",
    ),
    Bad(
        what="text that is not UTF-8",
        args=batch(),
        files={"data.jsonl": b'{"q": "caf\xe9"}\n'},
        status=3,
        says="data.jsonl:1: invalid UTF-8 in byte 11 of the line",
        hint="Convert the file, for example with `iconv -f ISO-8859-1 -t UTF-8`.",
    ),
    Bad(
        what="CSV with a field too many",
        args=batch("data.csv"),
        files={"data.csv": "q,n\na,1\nb,2,3\n"},
        status=3,
        says="data.csv:3: the row has 3 fields, the header 2 columns",
        hint="Put fields with commas, quotes or line breaks in quotes.",
    ),
    Bad(
        what="a Parquet file that is none",
        args=batch("data.parquet"),
        files={"data.parquet": "not Parquet"},
        status=3,
        says="data.parquet: not Parquet, or cut off or damaged: …",
        hint="Copy or make the file again; is it what its suffix says?",
    ),
    Bad(
        what="rows that can't be rendered",
        args=batch(),
        files={"data.jsonl": lines({"q": 1}, {"Q": 2}, {"q": None})},
        status=3,
        says=(
            "rows that can't be rendered:\n"
            "  data.jsonl:2: template: 'q' is undefined; the row has: Q\n"
            "  data.jsonl:3: template: a null is printed; where a value may be missing, write {{"
            " name or '' }}; null in this row: q"
        ),
        hint="mend the rows or the template; nothing was sent",
    ),
    Bad(
        what="no word of where the prompt is",
        args=batch(prompt=()),
        status=3,
        says=("one of --template, --prompt-column, --messages-column must say what the prompt is, not none"),
        hint=(
            "A template makes a chat of columns; the prompt column is completed as it is; the"
            " messages column has whole chats."
        ),
    ),
    Bad(
        what="two sources of the prompt",
        args=batch("data.jsonl", "--prompt-column", "q"),
        status=3,
        says=(
            "one of --template, --prompt-column, --messages-column must say what the prompt is, not"
            " --template and --prompt-column"
        ),
        hint=(
            "A template makes a chat of columns; the prompt column is completed as it is; the"
            " messages column has whole chats."
        ),
    ),
    Bad(
        what="a system message without a template",
        args=batch(prompt=("--prompt-column", "q", "--system", "Be brief.")),
        status=3,
        says="--system goes with --template, not with --prompt-column",
        hint="Put its text into the column.",
    ),
    Bad(
        what="a template that is missing",
        args=batch(prompt=("--template", "no.j2")),
        status=3,
        says="no.j2: there is no such file (--template)",
        hint="Check the path.",
    ),
    Bad(
        what="a template that is no Jinja2",
        args=batch(),
        files={"t.j2": "one\n{{ q\n"},
        status=3,
        says="template, line 2: unexpected end of template…",
        hint="Correct the Jinja2 template.",
    ),
    Bad(
        what="a column that is not there",
        args=batch(prompt=("--prompt-column", "Q")),
        status=3,
        says=(
            "rows that can't be rendered:\n"
            "  data.jsonl:1: no column 'Q'; the row has: q\n"
            "  data.jsonl:2: no column 'Q'; the row has: q\n"
            "  data.jsonl:3: no column 'Q'; the row has: q\n"
            "  data.jsonl:4: no column 'Q'; the row has: q\n"
            "  data.jsonl:5: no column 'Q'; the row has: q"
        ),
        hint="mend the rows or the template; nothing was sent",
    ),
    Bad(
        what="a sampling key that is refused",
        args=batch("data.jsonl", "--sampling", "n=4"),
        status=3,
        says="--sampling: `n` can't be set: samples are requests of their own",
        hint="Give --samples.",
    ),
    Bad(
        what="a misspelt sampling key",
        args=batch("data.jsonl", "--sampling", "max_token=5"),
        status=3,
        says="--sampling: chats have no member `max_token`, and an engine would pass over it",
        hint="Did you mean `max_tokens`? What only your engine's plugins know goes into `vllm_xargs`.",
    ),
    Bad(
        what="sampling without a value",
        args=batch("data.jsonl", "--sampling", "max_tokens"),
        status=2,
        says="--sampling 'max_tokens' is not KEY=VALUE",
        hint="for example --sampling max_tokens=512",
    ),
    Bad(
        what="a bound of the answers in words",
        args=batch("data.jsonl", "--sampling", "max_tokens=many"),
        status=3,
        says='--sampling: `max_tokens` must be a whole number from 1, not "many"',
        hint="For example --sampling max_tokens=512.",
    ),
    Bad(
        what="a temperature below zero",
        args=batch("data.jsonl", "--sampling", "temperature=-1"),
        status=3,
        says="--sampling: `temperature` must be a number from 0, not -1",
        hint="For example --sampling temperature=0.7.",
    ),
    Bad(
        what="a request that is to be streamed",
        args=batch("data.jsonl", "--sampling", "stream=true"),
        status=3,
        says="--sampling: `stream` can't be set: answers are read whole",
        hint="Leave it out.",
    ),
    Bad(
        what="sampling given twice",
        args=batch("data.jsonl", "--sampling", "top_p=1", "--sampling", "top_p=0.5"),
        status=2,
        says="--sampling gives top_p twice",
        hint="leave one of them out",
    ),
    Bad(
        what="one seed for all samples",
        args=batch("data.jsonl", "--samples", "2", "--sampling", "seed=1"),
        status=3,
        says="--sampling: with `seed`, all 2 samples of a row would be the same",
        hint="Give --seed, of which each sample's is made.",
    ),
    Bad(
        what="sampling with OpenAI lines",
        args=batch("data.jsonl", "--sampling", "top_p=1", prompt=()),
        files={"data.jsonl": lines(openai("a"))},
        status=3,
        says="--sampling is for plain rows, but the input's lines are OpenAI requests",
        hint="Write it into the lines' bodies.",
    ),
    Bad(
        what="samples of OpenAI lines",
        args=batch("data.jsonl", "--samples", "2", prompt=()),
        files={"data.jsonl": lines(openai("a"))},
        status=3,
        says="--samples 2: the input's lines are OpenAI requests, which are sent once",
        hint="Set `n` in the lines' bodies.",
    ),
    Bad(
        what="a template for OpenAI lines",
        args=batch(),
        files={"data.jsonl": lines(openai("a"))},
        status=3,
        says="--template is for plain rows, but the input's lines are OpenAI requests",
        hint="Write it into the lines' bodies.",
    ),
    Bad(
        what="no samples",
        args=batch("data.jsonl", "--samples", "0"),
        status=2,
        says="--samples: '0' is not a whole number from 1",
        hint="see `hpcserve batch --help`",
    ),
    Bad(
        what="a seed in words",
        args=batch("data.jsonl", "--seed", "mine"),
        status=2,
        says="--seed: invalid int value: 'mine'",
        hint="see `hpcserve batch --help`",
    ),
    Bad(
        what="a column with a name of the results",
        args=batch(),
        files={"data.jsonl": lines({"q": 1}, {"q": 2, "response": "x"})},
        status=3,
        says=(
            "the input's column 'response' has the name of a column of the results (these are"
            " response, reasoning, finish_reason, usage, attempts, error)"
        ),
        hint="Rename it in the input, or keep other columns only, or write OpenAI's batch lines.",
    ),
    Bad(
        what="a CSV column with a name of the results",
        args=batch("data.csv"),
        files={"data.csv": "q,error\na,b\n"},
        status=3,
        says=(
            "the input's column 'error' has the name of a column of the results (these are response,"
            " reasoning, finish_reason, usage, attempts, error)"
        ),
        hint="Rename it in the input, or keep other columns only, or write OpenAI's batch lines.",
    ),
    Bad(
        what="a first part and a random one",
        args=batch("data.jsonl", "--limit", "2", "--sample", "2"),
        status=3,
        says="--limit and --sample both say which rows",
        hint="give one of them; --sample chooses from all",
    ),
    Bad(
        what="more rows at random than there are",
        args=batch("data.jsonl", "--sample", "6"),
        status=3,
        says="--sample 6: the input has 5 rows",
        hint="leave it out for all of them",
    ),
    Bad(
        what="a table in order of completion",
        args=batch("data.jsonl", "--order", "completion", "--format", "parquet"),
        status=3,
        says=("--order completion is for --format openai: parquet repeats the input's columns, in its order"),
        hint="leave it out, or add --format openai",
    ),
    Bad(
        what="a format that nobody writes",
        args=batch("data.jsonl", "--format", "csv"),
        status=2,
        says="--format: invalid choice: 'csv'…",
        hint="see `hpcserve batch --help`",
    ),
    Bad(
        what="an error rate in letters",
        args=batch("data.jsonl", "--max-error-rate", "abc"),
        status=2,
        says="--max-error-rate: 'abc' is not a part from 0 to 1, such as 0.01 or 1%",
        hint="see `hpcserve batch --help`",
    ),
    Bad(
        what="an error rate above all",
        args=batch("data.jsonl", "--max-error-rate", "50"),
        status=2,
        says="--max-error-rate: '50' is not a part from 0 to 1, such as 0.01 or 1%",
        hint="see `hpcserve batch --help`",
    ),
    Bad(
        what="an output that is a file",
        args=batch(),
        files={"out": "mine"},
        status=3,
        says="-o ~/out: not a directory",
        hint="give another one; it is made if need be",
    ),
    Bad(
        what="an output below a file",
        args=("model.yaml", "data.jsonl", "-o", "t.j2/out", "--template", "t.j2"),
        status=7,
        says="can't make ~/t.j2/out/.batch: Not a directory",
        hint="give another directory with -o",
    ),
    Bad(
        what="an output that can't be made",
        args=batch(),
        given=fails("mkdir", errno.EACCES),
        status=7,
        says="can't make ~/out/.batch: Permission denied",
        hint="make it writable, or give another directory with -o",
    ),
    Bad(
        what="an output on a file system for reading",
        args=batch(),
        given=fails("mkdir", errno.EROFS),
        status=7,
        says="can't make ~/out/.batch: Read-only file system",
        hint="make it writable, or give another directory with -o",
    ),
    Bad(
        what="an output of something else",
        args=batch(),
        files={"out/output.jsonl": "mine"},
        status=3,
        says="~/out/output.jsonl is there already, and is not of a batch that can go on",
        hint="give another directory with -o, or move that file away",
    ),
    Bad(
        what="a disk that is full while planning",
        args=batch(),
        given=fails("fsync", errno.ENOSPC),
        status=7,
        says="can't write ~/out/.batch/.plan/requests-00000.data: No space left on device",
        hint="free space there; then give the same command again, and it goes on where it stopped",
    ),
    Bad(
        what="a used-up quota while planning",
        args=batch(),
        given=fails("write", errno.EDQUOT),
        status=7,
        says="can't write ~/out/.batch/.plan/requests-00000.data: Disk quota exceeded",
        hint="your quota is used up: delete files; then give the same command again, and it goes on",
    ),
    Bad(
        what="several jobs without a queue",
        args=batch("data.jsonl", "--jobs", "2"),
        status=2,
        says="--jobs 2: site local has no queue in which jobs could wait",
        hint="leave it out; the same command again goes on with the batch",
    ),
    Bad(
        what="jobs at once without a queue",
        args=batch("data.jsonl", "--parallel-jobs", "3"),
        status=2,
        says="--parallel-jobs 3: site local has no queue in which jobs could wait",
        hint="leave it out; the same command again goes on with the batch",
    ),
    Bad(
        what="Parquet without pyarrow",
        args=batch("data.parquet"),
        given=both(parquet({"q": ["a"]}), without("pyarrow")),
        status=3,
        says="data.parquet: reading Parquet needs the package pyarrow, which can't be imported: …",
        hint="Install it with `pip install 'hpcserve[batch]'`.",
    ),
    Bad(
        what="Parquet as output without pyarrow",
        args=batch("data.jsonl", "--format", "parquet"),
        given=without("pyarrow"),
        status=3,
        says="writing Parquet needs the package pyarrow, which can't be imported: …",
        hint="Install it with `pip install 'hpcserve[batch]'`.",
    ),
    Bad(
        what="without the extra",
        args=batch(),
        given=without("numpy"),
        status=3,
        says="`hpcserve batch` needs the package numpy, which can't be imported: …",
        hint="Install it with `pip install 'hpcserve[batch]'`.",
    ),
    Bad(
        what="another template than before",
        args=batch(),
        given=both(planned, lambda world: (world.home / "t.j2").write_text("{{ q }}?")),
        status=3,
        says=(
            "~/out has a batch of another request or input:\n"
            '  template: "Tell me about {{ q }}\\n" → {{ q }}?'
        ),
        hint="give the command that began it to go on with it, or another output directory with -o",
    ),
    Bad(
        what="more sampling than before",
        args=batch("data.jsonl", "--sampling", "max_tokens=9", "--samples", "2"),
        given=planned,
        status=3,
        says=(
            "~/out has a batch of another request or input:\n"
            "  samples: 1 → 2\n"
            "  sampling max_tokens: none → 9"
        ),
        hint="give the command that began it to go on with it, or another output directory with -o",
    ),
    Bad(
        what="another model than before",
        args=batch(),
        given=both(planned, lambda world: world.model.write_text(MODEL.replace("tiny", "other"))),
        status=3,
        says=("~/out has a batch of another request or input:\n  model: org/tiny → org/other"),
        hint="give the command that began it to go on with it, or another output directory with -o",
    ),
    Bad(
        what="other data than before",
        args=batch(),
        given=both(planned, lambda world: (world.home / "data.jsonl").write_text(ROWS * 2)),
        status=3,
        says=(
            "~/out has a batch of another request or input:\n"
            "  input 1: ~/data.jsonl: its content is another one"
        ),
        hint="give the command that began it to go on with it, or another output directory with -o",
    ),
    Bad(
        what="a long template that was changed at its end",
        args=batch(),
        given=both(
            lambda world: (world.home / "t.j2").write_text(LONG + "{{ q }}"),
            lambda world: planned(world, LONG + "{{q}}"),
        ),
        status=3,
        says=(
            "~/out has a batch of another request or input:\n"
            "  template: …Read this, and then answer. {{q}} → …Read this, and then answer. {{ q }}"
        ),
        hint="give the command that began it to go on with it, or another output directory with -o",
    ),
    Bad(
        what="one more file than before",
        args=batch(("data.jsonl", "more.jsonl")),
        given=planned,
        files={"more.jsonl": ROWS},
        status=3,
        says=("~/out has a batch of another request or input:\n  input 2: none → ~/more.jsonl"),
        hint="give the command that began it to go on with it, or another output directory with -o",
    ),
    Bad(
        what="a dry run of another command",
        args=batch("data.jsonl", "--limit", "2", "--dry-run"),
        given=planned,
        status=3,
        says=("~/out has a batch of another request or input:\n  limit: none → 2"),
        hint="give the command that began it to go on with it, or another output directory with -o",
    ),
    Bad(
        what="a manifest that is damaged",
        args=batch(),
        given=rewritten(lambda text: text[:100]),
        status=7,
        says="~/out/.batch/plan/manifest.json is damaged: Input data was truncated",
        hint="remove ~/out/.batch to plan anew; the answers in it are lost then",
    ),
    Bad(
        what="a plan of another format",
        args=batch(),
        given=rewritten(of_format_9),
        status=7,
        says="~/out/.batch/plan/manifest.json has format 9, this hpcserve (0.1.0) reads 1",
        hint="finish it with hpcserve 7.0, or give another output directory with -o",
    ),
    Bad(
        what="an endpoint that nobody has",
        args=("--endpoint", "ghost", "data.jsonl", "-o", "out"),
        status=8,
        says="no run is called 'ghost': there are none at all",
        hint="`hpcserve ls` lists your runs",
    ),
    Bad(
        what="an endpoint that is not READY",
        args=("--endpoint", "eval", "data.jsonl", "-o", "out"),
        given=both(on("test-cluster"), submit),
        status=8,
        says="run eval has no endpoint: it is starting (running)",
        hint="watch it with `hpcserve status eval`",
    ),
    Bad(
        what="an endpoint whose key can't be read",
        args=("--endpoint", "eval", "data.jsonl", "-o", "out"),
        given=both(on("test-cluster"), key_unreadable),
        status=8,
        says=(
            "can't read the endpoint's key in ~/.hpcserve/runs/eval/secrets/api-key: No such file or"
            " directory"
        ),
        hint="the batch must run as the user who launched the endpoint",
    ),
    Bad(
        what="an endpoint and a model",
        args=("--endpoint", "eval", *batch()),
        status=2,
        says="model.yaml and --endpoint eval both say what answers",
        hint="leave one of them out",
    ),
    Bad(
        what="an endpoint and jobs",
        args=("--endpoint", "eval", "data.jsonl", "-o", "out", "--jobs", "2"),
        status=2,
        says="--jobs is about a job, and --endpoint uses a run that serves already, here and now",
        hint="leave one of them out",
    ),
    Bad(
        what="an endpoint and jobs at once",
        args=("--endpoint", "eval", "data.jsonl", "-o", "out", "--parallel-jobs", "2"),
        status=2,
        says="--parallel-jobs is about a job, and --endpoint uses a run that serves already, here and now",
        hint="leave one of them out",
    ),
    Bad(
        what="an endpoint and a dry run",
        args=("--endpoint", "eval", "data.jsonl", "-o", "out", "--dry-run"),
        status=2,
        says="--dry-run is about a job, and --endpoint uses a run that serves already, here and now",
        hint="leave one of them out",
    ),
    Bad(
        what="an endpoint and nodes",
        args=("--endpoint", "eval", "data.jsonl", "-o", "out", "--nodes", "2"),
        status=2,
        says="--nodes is about a job, and --endpoint uses a run that serves already, here and now",
        hint="leave one of them out",
    ),
    Bad(
        what="an endpoint and no data",
        args=("--endpoint", "eval", "-o", "out"),
        status=2,
        says="the following arguments are required: model.yaml DATA",
        hint="see `hpcserve batch --help`",
    ),
]


def everything(home: Path) -> dict[str, bytes | None]:
    """All files below the home with what is in them, and all directories."""
    return {
        str(path.relative_to(home)): path.read_bytes() if path.is_file() else None
        for path in home.rglob("*")
        if not path.is_symlink()
    }


def fits(told: str, wanted: str) -> bool:
    return told.startswith(wanted[:-1]) if wanted.endswith("…") else told == wanted


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.what)
def test_a_bad_input_is_one_error_and_changes_nothing(world: World, bad: Bad) -> None:
    world.monkeypatch.setenv("HPCSERVE_SITE", "local")
    files = {"model.yaml": MODEL, "data.jsonl": ROWS, "t.j2": TEMPLATE, **bad.files}
    for name, content in files.items():
        path = world.home / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if bad.given is not None:
        bad.given(world)
    before, calls = everything(world.home), world.slurm.calls("sbatch")

    answer = world("batch", *bad.args)

    said = re.sub(r"\.plan\.[\w.-]+", ".plan", answer.err.replace(str(world.home), "~")).strip()
    message, _, hint = said.partition("\n\nhint: ")
    assert message.startswith("error: "), answer.err
    assert fits(message.removeprefix("error: "), bad.says), answer.err
    assert fits(hint, bad.hint), answer.err
    assert hint, f"no hint: {answer.err}"
    assert answer.status == bad.status, answer.err
    assert answer.out == ""
    world.monkeypatch.undo()
    assert everything(world.home) == before
    assert world.slurm.calls("sbatch") == calls
    assert processes_of(world.home) == []


def test_the_table_has_no_row_twice() -> None:
    assert len({bad.what for bad in TABLE}) == len(TABLE) >= 60


def test_what_is_left_behind_would_be_seen(world: World) -> None:
    """The check above can fail."""
    before = everything(world.home)
    for made in ("out", "out/.batch", "out/.batch/.plan.host.1"):
        (world.home / made).mkdir()
        assert everything(world.home) != before
        before = everything(world.home)
    world.model.write_text("changed")
    assert everything(world.home) != before


def test_a_job_that_is_refused_leaves_a_plan_that_the_same_command_goes_on_with(world: World) -> None:
    for name, text in {"model.yaml": MODEL, "data.jsonl": ROWS, "t.j2": TEMPLATE}.items():
        (world.home / name).write_text(text)
    world.slurm.refuses("Batch job submission failed: Invalid account or account/partition combination")
    refused = world("batch", *batch("data.jsonl", "--no-wait", "--nodes", "1"))
    assert refused.status == 5
    assert "planned 5 rows" in refused.err
    assert "Invalid account" in refused.err
    assert "--account" in refused.err.partition("hint: ")[2]
    assert not list(world.runs.glob("*"))
    assert BatchDir(world.home / "out").manifest.exists()
    world.slurm.accepts(42)
    again = world("batch", *batch("data.jsonl", "--no-wait", "--nodes", "1", "--json"))
    assert again.status == 0, again.err
    assert "goes on with 5 rows" in again.err
    assert json.loads(again.out)["state"] == "submitted"


def test_a_disk_that_fills_up_at_any_file_leaves_nothing_or_a_whole_plan(world: World) -> None:
    """Every fsync of the planning fails once."""
    world.monkeypatch.setenv("HPCSERVE_SITE", "local")
    for name, text in {"data.jsonl": ROWS, "t.j2": TEMPLATE}.items():
        (world.home / name).write_text(text)
    before = everything(world.home)
    real, calls, fails_at = os.fsync, 0, 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    world.monkeypatch.setattr(os, "fsync", fsync)
    done = False
    while not done:
        calls, fails_at = 0, fails_at + 1
        try:
            planned(world)
            done = True
        except StorageError as error:
            assert "No space left" in error.message
            if BatchDir(world.home / "out").manifest.exists():
                # It was whole when it got its name; only whether that lasts was not sure.
                assert planned(world)
                shutil.rmtree(world.home / "out")
            assert everything(world.home) == before
    assert fails_at > 4
