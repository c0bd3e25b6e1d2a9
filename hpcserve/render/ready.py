"""The READY block: what somebody needs to use the endpoint, to copy and paste. Pure."""

from __future__ import annotations

import shlex
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """What endpoint.json and run.json say, and where the reader sits."""

    url: str
    """`http://HOST:PORT/v1`."""
    host: str
    port: int
    served_name: str
    key_file: str | None
    """None: the endpoint asks for no key."""
    name: str
    """The run, for commands of hpcserve."""
    user: str = ""
    login_host: str | None = None
    """For a tunnel from outside; None when the site config does not say."""
    ready_seconds: float | None = None
    left: int | None = None
    """Seconds until the walltime is over."""


def ready_block(endpoint: Endpoint) -> str:
    """Several lines, no trailing line break."""
    parts = [
        _title(endpoint),
        *_facts(endpoint),
        "",
        "# from your own machine",
        tunnel_command(endpoint),
        "",
        "# curl",
        curl_command(endpoint),
        "",
        "# Python (pip install openai)",
        python_client(endpoint),
        "",
        "next: "
        + " · ".join(f"hpcserve {command} {endpoint.name}" for command in ("chat", "status", "stop")),
    ]
    return "\n".join(parts)


def _title(endpoint: Endpoint) -> str:
    title = "READY"
    if endpoint.ready_seconds is not None:
        title += f" after {endpoint.ready_seconds:.1f} s"
    if endpoint.left is not None:
        hours, rest = divmod(max(0, endpoint.left), 3600)
        title += f", {hours} h {rest // 60:02} min left"
    return title


def _facts(endpoint: Endpoint) -> list[str]:
    key = (
        endpoint.key_file
        if endpoint.key_file is not None
        else "none: anybody who reaches the port may use it"
    )
    return [f"  base URL  {endpoint.url}", f"  model     {endpoint.served_name}", f"  API key   {key}"]


def tunnel_command(endpoint: Endpoint, local_port: int | None = None) -> str:
    """The `ssh -N -L` line; the host is a placeholder when the site config names none."""
    local = local_port if local_port is not None else endpoint.port
    host = endpoint.login_host or "LOGIN_HOST"
    target = f"{endpoint.user}@{host}" if endpoint.user else host
    forward = f"{local}:{_bracketed(endpoint.host)}:{endpoint.port}"
    return f"ssh -N -L {shlex.quote(forward)} {shlex.quote(target)}"


def curl_command(endpoint: Endpoint) -> str:
    """One chat request. The key goes in through a file descriptor, not through `ps`."""
    body = f'{{"model": "{endpoint.served_name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    lines = [f"curl {shlex.quote(endpoint.url + '/chat/completions')}"]
    if endpoint.key_file is not None:
        file = shlex.quote(endpoint.key_file)
        lines.append(f"  -H @<(printf 'Authorization: Bearer %s' \"$(cat {file})\")")
    lines += ["  -H 'Content-Type: application/json'", f"  -d {shlex.quote(body)}"]
    return " \\\n".join(lines)


def python_client(endpoint: Endpoint) -> str:
    key = f"open({endpoint.key_file!r}).read().strip()" if endpoint.key_file is not None else '"none"'
    return "\n".join(
        (
            "from openai import OpenAI",
            f"client = OpenAI(base_url={endpoint.url!r}, api_key={key})",
            f"print(client.chat.completions.create(model={endpoint.served_name!r},",
            '    messages=[{"role": "user", "content": "Hello"}]).choices[0].message.content)',
        )
    )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
