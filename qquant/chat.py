"""``qquant chat``: talk to a model in a terminal, or through a pipe, one line per turn.

The recipe: load the folder, quantized or not; read a line; obey it as a command or answer it while it is generated.
Answers go to stdout, everything else to stderr. Turns and prompts are conversation.py's, the words of the commands
chat_terminal.py's; torch is imported inside.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qquant.code_keys import ignoring_code
from qquant.console import printable, user_errors
from qquant.errors import QquantError, UsageError

if TYPE_CHECKING:
    from qquant.conversation import Conversation

_CACHES = {"auto": None, "int8": True, "off": False}


def open_conversation(
    model: str | Path,
    *,
    wanted: str = "auto",
    system: str | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    kv_cache: str = "auto",
) -> Conversation:
    """Load a model with its tokenizer and begin a conversation.

    Args:
        model: folder or hub id, quantized or not.
        wanted: "auto", or "raw" or "chatml", see ``conversation.choose_style``.
        system: the system prompt; None: the model's own.
        seed: of sampling.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", "cuda:1" ...
        kv_cache: "int8", "off", or "auto": as config.json says.

    Raises:
        QquantError: bad options, or a model that cannot be loaded or does not chat.
    """
    from qquant.checkpoint import load_model
    from qquant.conversation import Conversation, choose_style
    from qquant.json_files import read_json
    from qquant.model_folder import load_tokenizer, resolve_folder
    from qquant.sources import pick_device, pick_dtype

    if kv_cache not in _CACHES:
        raise UsageError(f"--kv-cache must be one of {', '.join(_CACHES)}, got {kv_cache!r}")
    where, compute, folder = pick_device(device), pick_dtype(dtype), resolve_folder(str(model))
    if (generation := folder / "generation_config.json").exists():
        read_json(generation)  # transformers passes over one that it cannot read
    tokenizer = load_tokenizer(folder)
    loaded = load_model(folder, dtype=compute or "auto", device=where, int8_cache=_CACHES[kv_cache])
    return Conversation(loaded, tokenizer, choose_style(loaded, tokenizer, wanted), system, seed)


def chat_command(
    model: Annotated[str, typer.Argument(help="Model folder or hub id, quantized or not.", metavar="DIR")],
    system: Annotated[str | None, typer.Option(help="System prompt; default: the model's own.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling, anew for each answer.")] = 0,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = None,
    conf: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, as :conf takes it; repeatable.")] = None,
    wanted: Annotated[
        str, typer.Option("--format", help="auto, raw: continue text, or chatml: Qwen v1 that does not say so.")
    ] = "auto",
    kv_cache: Annotated[str, typer.Option("--kv-cache", help="int8, off, or auto: as config.json says.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Compute dtype: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    ignore_code: Annotated[
        bool, typer.Option("--ignore-code", help="Open a folder whose files name code, without it.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Chat with a model, one line per turn; :help lists the commands. Answers go to stdout, all else to stderr."""
    with user_errors(debug=debug), ignoring_code(ignore_code):
        logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
        from qquant.chat_terminal import parse_settings
        from qquant.progress import quiet_transformers, step_progress

        for stream, name in ((sys.stdin, "stdin"), (sys.stdout, "stdout")):
            if stream is None:  # what Python makes of a descriptor that is closed
                raise UsageError(f"a chat needs an open stdin and stdout, {name} is closed; use /dev/null for none")
        settings = parse_settings(" ".join(conf or []))
        if max_new_tokens is not None:
            settings["max_new_tokens"] = max_new_tokens
        quiet_transformers()
        with step_progress() as on_progress:
            on_progress("loading the model", 0, 1)
            conversation = open_conversation(
                model, wanted=wanted, system=system, seed=seed, dtype=dtype, device=device, kv_cache=kv_cache
            )
        conversation.set(settings)
        if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal of another encoding shows escapes, not a traceback
            sys.stdout.reconfigure(errors="backslashreplace")
        if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are no text: the conversation refuses their line
            sys.stdin.reconfigure(errors="surrogateescape")
        converse(conversation, interactive=sys.stdin.isatty())


def converse(conversation: Conversation, *, interactive: bool) -> None:
    """Read lines from stdin and obey or answer each, until the input ends or ``:exit``.

    Args:
        conversation: whose state is changed.
        interactive: a person types. Errors and Ctrl-C then end the turn; in a pipe they end the process.

    Raises:
        QquantError: a line that cannot be followed, where nobody can correct it.
    """
    if interactive:
        _tell("one line per turn; :help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    noted = False
    for line in _lines(interactive):
        if not line.strip():
            continue
        try:
            command = _command(conversation, line)
            if command == "exit":
                return
            if command == "clear":
                noted = False
            if command is None:
                noted = _turn(conversation, line, noted)
        except QquantError as error:
            if not interactive:
                raise
            _tell(f"error: {error}")
        except KeyboardInterrupt:
            if not interactive:
                raise
            _tell("stopped")


def _lines(interactive: bool) -> Iterator[str]:
    """The lines of stdin without their ends; a person gets a prompt and the terminal's editing."""
    if interactive and sys.stdout.isatty():
        with suppress(ImportError):  # not on every platform; input() then edits less
            import readline  # noqa: F401
    while True:
        try:
            if interactive and sys.stdout.isatty():
                line = input("> ")
            else:
                if interactive:
                    typer.echo("> ", nl=False, err=True)
                line = sys.stdin.readline()
                if not line:
                    raise EOFError
        except EOFError:
            if interactive:
                _tell("")
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            _tell("\nCtrl-D or :exit leaves")
            continue
        except UnicodeDecodeError as error:
            raise UsageError(f"what is typed must be text in the terminal's encoding, {error.encoding}") from error
        yield line.rstrip("\r\n")


def _command(conversation: Conversation, line: str) -> str | None:
    """Do what a command says and return its name; None for a line that is to be answered."""
    from qquant.chat_terminal import SETTINGS, help_text, parse_command, parse_seed, parse_settings

    parsed = parse_command(line)
    if parsed is None:
        return None
    name, rest = parsed
    if rest and name not in ("seed", "conf"):
        raise UsageError(f":{name} takes nothing after it, got {rest!r}")
    if name == "help":
        _tell(help_text())
    elif name == "clear":
        conversation.history.clear()
        _tell("the conversation is forgotten")
    elif name == "history":
        turns = [f"> {asked}\n{answered}" for asked, answered in conversation.history]
        _tell("\n".join(turns) or "nothing was said yet")
    elif name == "seed":
        conversation.seed = parse_seed(rest) if rest else conversation.seed
        _tell(f"seed {conversation.seed}")
    elif name == "conf":
        conversation.set(parse_settings(rest))
        known = {setting: conversation.setting(setting) for setting in SETTINGS}
        shown = [f"{setting}={value}" for setting, value in known.items() if value is not None]
        _tell(" ".join(shown).replace("True", "true").replace("False", "false") or "no setting differs from the usual")
    return name


def _turn(conversation: Conversation, query: str, noted: bool) -> bool:
    """Show the answer while it is made; returns whether it was ever said that turns were left out."""
    prompt = conversation.prepare(query)
    if prompt.left_out and not noted:
        _tell(f"note: the oldest turns ({prompt.left_out} so far) no longer fit and are left out")
    shown = 0
    try:
        with closing(conversation.answer(prompt)) as texts:
            for text in texts:
                sys.stdout.write(printable(text[shown:]))
                sys.stdout.flush()
                shown = len(text)
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return noted or prompt.left_out > 0


def _tell(text: str) -> None:
    typer.echo(printable(text), err=True)


if __name__ == "__main__":
    typer.run(chat_command)
