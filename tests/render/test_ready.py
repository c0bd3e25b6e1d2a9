"""The READY block is to be copied and pasted: its parts must work as they stand."""

from __future__ import annotations

import ast
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

from hpcserve.render.ready import Endpoint, curl_command, python_client, ready_block, tunnel_command

ENDPOINT = Endpoint(
    url="http://10.0.0.1:20080/v1",
    host="10.0.0.1",
    port=20080,
    served_name="llama",
    key_file="/runs/llama/secrets/api-key",
    name="llama",
    user="alice",
    login_host="login.cluster.edu",
    ready_seconds=83.25,
    left=3 * 3600 + 59 * 60 + 30,
)


def test_ready_block() -> None:
    assert ready_block(ENDPOINT) == (
        "READY after 83.2 s, 3 h 59 min left\n"
        "  base URL  http://10.0.0.1:20080/v1\n"
        "  model     llama\n"
        "  API key   /runs/llama/secrets/api-key\n"
        "\n"
        "# from your own machine\n"
        "ssh -N -L 20080:10.0.0.1:20080 alice@login.cluster.edu\n"
        "\n"
        "# curl\n"
        "curl http://10.0.0.1:20080/v1/chat/completions \\\n"
        "  -H @<(printf 'Authorization: Bearer %s' \"$(cat /runs/llama/secrets/api-key)\") \\\n"
        "  -H 'Content-Type: application/json' \\\n"
        '  -d \'{"model": "llama", "messages": [{"role": "user", "content": "Hello"}]}\'\n'
        "\n"
        "# Python (pip install openai)\n"
        "from openai import OpenAI\n"
        "client = OpenAI(base_url='http://10.0.0.1:20080/v1', "
        "api_key=open('/runs/llama/secrets/api-key').read().strip())\n"
        "print(client.chat.completions.create(model='llama',\n"
        '    messages=[{"role": "user", "content": "Hello"}]).choices[0].message.content)\n'
        "\n"
        "next: hpcserve chat llama · hpcserve status llama · hpcserve stop llama"
    )


def test_the_curl_line_sends_the_key_without_showing_it(tmp_path: Path) -> None:
    key = tmp_path / "it's a key"
    key.write_text("sesame\n")
    (tmp_path / "curl").write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@"\nfor a in "$@"; do case $a in @*) cat "${a#@}";; esac; done\n'
    )
    (tmp_path / "curl").chmod(0o755)
    line = curl_command(replace(ENDPOINT, key_file=str(key), served_name="it's"))
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        check=True,
    )
    words = done.stdout.splitlines()
    assert words[-1] == "Authorization: Bearer sesame"
    assert not [word for word in words[:-1] if "sesame" in word]
    assert '{"model": "it\'s"' in done.stdout


def test_python_client_is_python() -> None:
    ast.parse(python_client(replace(ENDPOINT, key_file="/a'b", served_name='x"y')))


def test_without_a_key_the_block_warns() -> None:
    block = ready_block(replace(ENDPOINT, key_file=None))
    assert "API key   none: anybody who reaches the port may use it" in block
    assert "Authorization" not in block
    assert 'api_key="none"' in block


def test_tunnel() -> None:
    assert tunnel_command(replace(ENDPOINT, host="fd00::1"), 8000) == (
        f"ssh -N -L {shlex.quote('8000:[fd00::1]:20080')} alice@login.cluster.edu"
    )
    assert tunnel_command(replace(ENDPOINT, user="", login_host=None)).endswith(" LOGIN_HOST")
