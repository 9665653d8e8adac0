"""``veneer-train``: prepare data, train adapters, and evaluate or export them."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer
from veneer_client.cli.login_flags import CaFlag, CertFlag, KeyFlag, ProfileFlag, keep_login
from veneer_registry.command_line import Program

from veneer_train.commands import adapter, base, data, lab, train

_EXAMPLES = """
Examples:

  veneer-train data sql --out sql                       build a data set

  veneer-train plan --base smollm2-135m --preset quick  show the memory of a run

  veneer-train train examples/configs/sql.yaml --base smollm2-135m

  veneer-train verify my-sql --base smollm2-135m        check an adapter

  veneer-train --install-completion                     Tab completes
"""

app = Program(
    name="veneer-train",
    help="Train LoRA adapters in the server's own format.",
    epilog=_EXAMPLES,
    guesses={
        "run": "veneer-train train",
        "start": "veneer-train train",
        "fit": "veneer-train train",
        "evaluate": "veneer-train eval",
        "test": "veneer-train eval",
        "check": "veneer-train verify",
        "export": "veneer-train export-gguf",
        "push": "veneer push",
        "version": "veneer-train --version",
    },
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"veneer {version('veneer')}")
        raise typer.Exit


@app.callback()
def top(
    profile: ProfileFlag = None,
    ca: CaFlag = None,
    cert: CertFlag = None,
    key: KeyFlag = None,
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Train LoRA adapters in the server's own format. The API key for publishing is
    read from VENEER_API_KEY, or from the profile saved by `veneer login`."""
    keep_login(profile=profile, ca=ca, cert=cert, key=key)


app.command("import-gguf", epilog=base.IMPORT_EXAMPLES)(base.import_gguf)
app.command("quantize", epilog=base.QUANTIZE_EXAMPLES)(base.quantize)
app.command("plan", epilog=base.PLAN_EXAMPLES)(base.plan)
app.command("data", epilog=data.DATA_EXAMPLES)(data.data)
app.command("inspect-data", epilog=data.INSPECT_EXAMPLES)(data.inspect_data)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("eval", epilog=adapter.EVAL_EXAMPLES)(adapter.evaluate)
app.command("verify", epilog=adapter.VERIFY_EXAMPLES)(adapter.verify)
app.command("merge", epilog=adapter.MERGE_EXAMPLES)(adapter.merge)
app.command("export-gguf", epilog=adapter.EXPORT_EXAMPLES)(adapter.export_gguf)
app.command("lab", epilog=lab.EXAMPLES)(lab.lab)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="veneer-train")


if __name__ == "__main__":
    main()
