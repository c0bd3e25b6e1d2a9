"""Fetch the container image of a site from its registry, once for all runs.

It goes to `container.cache` of the site. Who asks while another process pulls waits for that one. An image
that is there is not pulled again: to follow a tag that moved, remove the file first.
"""

from __future__ import annotations

import argparse
import os

from ..errors import UsageError
from .arguments import Parser, add_json
from .output import print_json, say


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--site", metavar="NAME|FILE", help="site config (default: $HPCSERVE_SITE, or by host name)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..config.sites import find_site
    from ..images.pull import pull, registry_image

    site = find_site(args.site, environ=os.environ, hostname=os.uname().nodename).value
    image = registry_image(site, os.environ)
    if image is None:
        raise UsageError(
            f"site {site.name} has no image of a registry: "
            f"container.image is {site.container.image or 'not set'}",
            hint="set it to a name such as docker://vllm/vllm-openai:v0.32.0, with `container.runtime`",
        )
    fetched = pull(image, os.environ, say=say)
    if args.json:
        print_json({"image": str(image.path), "pulled": fetched})
        return 0
    say("pulled" if fetched else "it was there already")
    print(image.path)
    return 0
