"""Starts vLLM's processes on a node without an API: `python -m hpcserve.engines.vllm_headless --headless …`.

It is what `vllm serve --headless` does. That program asks for the version of an installed package named
`vllm`, which builds for the CPU don't have, and the module of the API server knows no `--headless`.
"""

from __future__ import annotations


def main() -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()  # type: ignore[no-untyped-call]
    parser = FlexibleArgumentParser(description="vLLM without an API")  # type: ignore[no-untyped-call]
    parser = make_arg_parser(parser)
    args = parser.parse_args()
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    ServeSubcommand.cmd(args)


if __name__ == "__main__":
    main()
