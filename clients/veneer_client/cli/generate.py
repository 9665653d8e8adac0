"""``veneer generate``: the answer to one prompt, shown as it arrives."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, cast

import typer
from rich.console import Console
from veneer_registry.command_line import with_parameters
from veneer_registry.errors import InvalidField
from veneer_registry.screen import Screen
from veneer_registry.terminal import write_answer

from veneer_client.cli.complete import adapter_names
from veneer_client.cli.context import (
    DebugFlag,
    JsonFlag,
    ServerOption,
    connect,
    errors_shown,
)
from veneer_client.cli.sampling_flags import flag_parameters
from veneer_client.cli.show import as_json, summary, write_reasoning
from veneer_client.client import Client
from veneer_client.types import (
    Chat,
    FinishReason,
    GenerateOptions,
    Generation,
    GenerationEnd,
    Prompt,
    Sample,
    Text,
    TokenLogprob,
    TopLogprob,
)

__all__ = [
    "AdapterOption",
    "MaxTokens",
    "SessionOption",
    "generate",
    "given",
    "named",
]

_LARGEST: Final = (1 << 31) - 1
"""Upper bound for a number of tokens, more than any context has."""

AdapterOption = Annotated[
    str | None,
    typer.Option(
        "-a",
        "--adapter",
        help="NAME, NAME@REVISION or NAME/ALIAS; default: the base model.",
        autocompletion=adapter_names,
    ),
]
SessionOption = Annotated[
    str | None,
    typer.Option(
        "--session",
        metavar="KEY",
        help="If an alias has several targets, the same key always gets the same target.",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        help="Maximum number of new tokens; default: the server's.", min=1, max=_LARGEST
    ),
]

EXAMPLES = """
Examples:

  veneer generate "Name three rivers."

  veneer generate -a code --temperature 0 "Reverse a string."

  veneer generate --raw --max-tokens 20 "The capital of France is"

  veneer generate -a chat - < question.txt

  veneer generate --choice yes --choice no "Is 7 a prime?"

  veneer generate --json-schema person.json "Describe Ada Lovelace."

  veneer generate --n 3 --seed 1 --max-tokens 20 "Name a colour."

  veneer generate -a chat/prod --session user-42 "Good morning."

  veneer generate --top-logprobs 3 --max-tokens 4 "The sky is"
"""


@with_parameters(flag_parameters(), before="logit_bias")
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads standard input.")],
    adapter: AdapterOption = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat/--raw", help="Send the prompt as a chat message, or continue it verbatim."
        ),
    ] = True,
    max_tokens: MaxTokens = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(metavar="ID=BIAS", help="Bias added to a token's logit; repeatable."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this string; repeatable.")
    ] = None,
    stop_token_id: Annotated[
        list[int] | None,
        typer.Option(help="Stop at this token; repeatable.", min=0, max=_LARGEST),
    ] = None,
    min_tokens: Annotated[
        int | None,
        typer.Option(
            help="Minimum number of new tokens; no stop condition applies before it.",
            min=0,
            max=_LARGEST,
        ),
    ] = None,
    json_schema: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|JSON", help="Constrain the output to JSON that matches this schema."
        ),
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="Constrain the whole output to this regular expression.")
    ] = None,
    choice: Annotated[
        list[str] | None,
        typer.Option(help="Constrain the output to one of these texts; repeatable."),
    ] = None,
    grammar: Annotated[
        str | None, typer.Option(help="Constrain the output to this Lark grammar.")
    ] = None,
    reasoning_effort: Annotated[
        str | None,
        typer.Option(
            metavar="EFFORT",
            help="Reasoning effort, for chat templates that support it: none, low, high ...",
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n", "-n", help="Number of samples, 1 to 16; printed when all are done.", min=1
        ),
    ] = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Show each token's log-probability, too.")
    ] = False,
    top_logprobs: Annotated[
        int | None,
        typer.Option(
            help="Show the N most likely tokens at each position, too; at most 20.", min=0
        ),
    ] = None,
    prefix_cache: Annotated[
        bool | None,
        typer.Option("--prefix-cache/--no-prefix-cache", help="Default: the server's."),
    ] = None,
    session: SessionOption = None,
    priority: Annotated[
        int | None,
        typer.Option(
            help="Priority among your tenant's requests, -100 to 100; lower starts earlier. "
            "Default: 0.",
            min=-100,
            max=100,
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            help="Timeout of the whole call in seconds, including retries.", min=0.001
        ),
    ] = None,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
    **sampling: Any,
) -> None:
    """Generate text, shown as it arrives."""
    with errors_shown(context, debug), connect(context, server) as client:
        options = given(
            adapter=named(adapter),
            max_tokens=max_tokens,
            **sampling,
            logit_bias=_biases(logit_bias) if logit_bias else None,
            stop=stop or None,
            stop_token_ids=stop_token_id or None,
            json_schema=None if json_schema is None else _schema(json_schema),
            regex=regex,
            choice=choice or None,
            grammar=grammar,
            min_tokens=min_tokens,
            reasoning_effort=reasoning_effort,
            n=n,
            logprobs=logprobs or None,
            top_logprobs=top_logprobs,
            use_prefix_cache=prefix_cache,
            session_key=session,
            priority=priority,
            timeout_s=timeout,
        )
        text = _prompt(prompt, chat=chat)
        asked: Prompt = Chat.user(text) if chat else Text(text)
        if json_:
            answer = client.generate(asked, **options)
            print(as_json(answer))
            reasons = {answer.finish_reason, *(each.finish_reason for each in answer.others)}
            if FinishReason.LENGTH in reasons:
                _warn_of_cut(_notes(), options)
        elif (n or 1) > 1:
            _samples(client, asked, options)
        else:
            _stream(client, asked, options)


def _prompt(given_as: str, *, chat: bool) -> str:
    text = given_as
    if given_as == "-":
        if sys.stdin.isatty():
            _notes().print("reading the prompt from the terminal; Ctrl-D ends it", style="dim")
        text = sys.stdin.read()
    try:
        text.encode()
    except UnicodeEncodeError as error:  # from a shell or file with another encoding
        raise InvalidField(
            "the prompt is not UTF-8: convert it, for example with iconv -t UTF-8",
            metadata={"field": "prompt"},
        ) from error
    # The server would answer an empty message at length: a chat template has text around it.
    if not (text.strip() if chat else text):
        where = "standard input has no text" if given_as == "-" else "give one, or - to read it"
        raise InvalidField(f"the prompt is empty: {where}", metadata={"field": "prompt"})
    return text


def named(adapter: str | None) -> str:
    """The adapter to use; "" for the base. Raises InvalidField for an empty flag, which a
    script gives if its variable is unset: the base must not answer then."""
    if adapter == "":
        raise InvalidField(
            "--adapter is empty: give a name, or leave it out for the base model",
            metadata={"field": "adapter"},
        )
    return adapter or ""


def given(**options: Any) -> GenerateOptions:
    """The options that are not None."""
    kept = {name: value for name, value in options.items() if value is not None}
    return cast(GenerateOptions, kept)


def _biases(pairs: Iterable[str]) -> dict[int, float]:
    biases = {}
    for pair in pairs:
        token, _, bias = pair.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError as error:
            raise InvalidField(
                f"logit bias {pair!r} is not ID=BIAS, for example --logit-bias 42=-100",
                metadata={"field": "sampling.logit_bias"},
            ) from error
    return biases


def _schema(given_as: str) -> Mapping[str, object]:
    """A schema, given as JSON or as the name of a file."""
    text = given_as
    try:
        if not given_as.lstrip().startswith("{"):
            text = Path(given_as).read_text("utf-8")
        schema = json.loads(text)
    except OSError as error:
        raise _no_schema(given_as, error.strerror or str(error)) from error
    except ValueError as error:
        raise _no_schema(given_as, str(error)) from error
    if not isinstance(schema, dict):
        raise _no_schema(given_as, "a schema must be a JSON object")
    return schema


def _no_schema(given_as: str, why: str) -> InvalidField:
    return InvalidField(
        f"--json-schema {given_as[:60]!r} is not a JSON schema ({why}): give JSON that starts "
        "with {, or a file that contains it",
        metadata={"field": "constraint.json_schema"},
    )


def _notes() -> Console:
    return Screen(stderr=True, highlight=False, markup=False, soft_wrap=True)


_CUT: Final = {
    "regex": "the answer does not match the regular expression yet",
    "choice": "the answer is not a whole choice",
    "grammar": "the answer does not match the grammar yet",
}


def _warn_of_cut(notes: Console, options: GenerateOptions) -> None:
    """Warn that an answer was cut off before it fulfilled its constraint."""
    schema = options.get("json_schema")
    told = [why for option, why in _CUT.items() if option in options]
    more = ""
    if schema is not None:
        told = ["the JSON is incomplete"]
        if _open(schema):
            more = (
                ". The schema allows members that it does not name, and the model may go on "
                'adding some: "additionalProperties": false in its objects forbids that'
            )
    if told:
        notes.print(
            f"warning: {told[0]}: allow more tokens (--max-tokens){more}", style="yellow"
        )


def _open(schema: object) -> bool:
    """Whether an object of the schema allows members that it does not name."""
    if isinstance(schema, Mapping):
        if "properties" in schema and schema.get("additionalProperties", True) is not False:
            return True
        return any(map(_open, schema.values()))
    return isinstance(schema, list) and any(map(_open, schema))


def _stream(client: Client, prompt: Prompt, options: GenerateOptions) -> None:
    notes = _notes()
    scores: list[TokenLogprob] = []
    ended_line = True
    with client.generate_stream(prompt, **options) as stream:
        try:
            for chunk in stream:
                write_reasoning(chunk)
                if chunk.text:
                    write_answer(sys.stdout, chunk.text)
                    ended_line = chunk.text.endswith("\n")
                scores += chunk.logprobs
        except KeyboardInterrupt:
            stream.cancel()
            sys.stdout.write("" if ended_line else "\n")
            sys.stdout.flush()
            notes.print("stopped: the server has been told to stop generating", style="dim")
            raise typer.Exit(130) from None
        if not ended_line:
            sys.stdout.write("\n")
            sys.stdout.flush()
        _show_scores(notes, scores)
        if stream.final.finish_reason is FinishReason.LENGTH:
            _warn_of_cut(notes, options)
        notes.print(summary(stream.final), style="dim")


def _samples(client: Client, prompt: Prompt, options: GenerateOptions) -> None:
    notes = _notes()
    answer = client.generate(prompt, **options)
    samples: tuple[Generation | Sample, ...] = (answer, *answer.others)
    cut = False
    for number, sample in enumerate(samples, 1):
        write_answer(sys.stdout, f"[{number}] {sample.text}\n")
        _show_scores(notes, sample.logprobs)
        if sample.finish_reason is FinishReason.LENGTH:
            cut = True
            told = f"[{number}] was cut after {len(sample.token_ids)} tokens (see --max-tokens)"
            notes.print(told, style="dim")
    if cut:
        _warn_of_cut(notes, options)
    end = GenerationEnd(
        answer.request_id, answer.finish_reason, answer.usage, answer.provenance
    )
    notes.print(summary(end, samples=len(samples)), style="dim")


def _show_scores(notes: Console, scores: Iterable[TokenLogprob]) -> None:
    scores = tuple(scores)
    if not any(score.top for score in scores):
        if scores:
            pairs = " ".join(map(_shown, scores))
            notes.print(f"token:logprob  {pairs}", style="dim")
        return
    for score in scores:
        beside = " ".join(map(_shown, score.top))
        notes.print(f"{_shown(score)}  of  {beside}", style="dim")


def _shown(score: TokenLogprob | TopLogprob) -> str:
    """The token quoted, since it may be a space or newline; its id if an older server sends no
    text."""
    name = json.dumps(score.token, ensure_ascii=False) if score.token else score.token_id
    return f"{name}:{score.logprob:.3f}"
