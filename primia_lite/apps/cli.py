"""The ``primia-lite`` command. Each command imports what it needs when it runs, so ``--help`` is instant."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence

from primia_lite import __version__
from primia_lite.apps import smpc
from primia_lite.apps.flower.commands import add_arguments as deploy_arguments
from primia_lite.config import DATA_SOURCES, UserError, elsewhere, set_variable
from primia_lite.runtime import any_console

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
_REFUSED = {  # what the system says of a file or folder that can't be written
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, 1 (something failed), 2 (wrong use, message on stderr) or 130 (Ctrl-C)."""
    any_console()
    args = _parser().parse_args(argv)
    try:
        return args.call(args) or 0
    except UserError as error:
        print(f"primia-lite {args.command}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # primia-lite data | head
        sys.stderr.close()
        return 0
    except OSError as error:  # a folder that can't be written, a full disk
        print(f"primia-lite {args.command}: {_said(error)}", file=sys.stderr)
        return EXIT_USAGE


def _said(error: OSError) -> str:
    """What the system said, and what to do."""
    said = str(error.strerror or error)
    if error.filename is not None:
        said = f"{os.fsdecode(error.filename)}: {said}"
    if "temporary directory" in said:
        return f"{said}. Free space, or {set_variable('TMPDIR')}"
    if error.errno in _REFUSED:
        return f"{said}. Mend that, or {elsewhere(error.filename) if error.filename else 'choose another folder'}"
    return said


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="primia-lite", description="Privacy-preserving chest X-ray diagnosis.")
    parser.add_argument("--version", action="version", version=f"primia-lite {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, call: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text)
        added.set_defaults(call=call)
        return added

    _film_arguments(command)
    _service_arguments(command)
    ledger = command("ledger", _ledger, "what a hospital's privacy ledger was charged for, and what is left")
    ledger.add_argument("file", metavar="FILE", help="such as runs/smoke-phantom/state/.../ledger-A.sqlite")
    _audit_arguments(command("audit", _audit, "lower bounds on ε by attacks, beside what is claimed; privacy cards"))
    deploy_arguments(
        command("deploy", lambda args: args.deploy(args), "a federation over Flower, as processes over TLS")
    )
    smpc.add_arguments(command("smpc", lambda args: args.smpc(args), "a diagnosis on shares, between two servers"))
    bench = command("bench", _bench, "list the benchmarks, or run one")
    bench.add_argument("name", nargs="?")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="given to the benchmark")
    return parser


def _audit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", metavar="RUN_FOLDER", help="of a run by federate(); left out: a recipe")
    parser.add_argument("--card", action="store_true", help="write the run's privacy card, privacy_card.md and .html")
    parser.add_argument("--epsilon", type=float, default=8.0, help="of the recipe (default: 8)")
    parser.add_argument("--sample-rate", type=float, default=0.5, help="of the recipe (default: 0.5; 1: full batches)")
    parser.add_argument("--steps", type=int, default=40, help="of the recipe (default: 40)")
    parser.add_argument("--how", choices=["one run", "many runs", "low bits"], help="default: what suits the recipe")
    parser.add_argument("-n", type=int, help="canaries of one run, or runs (default: 5000, 1000)")


def _film_arguments(command: Callable[..., argparse.ArgumentParser]) -> None:
    run = command("run", _run, "run the notebooks")
    run.add_argument("--profile", default="smoke", help="configs/<profile>.yaml (default: smoke)")
    run.add_argument("--data", metavar="SOURCE", help=f"{', '.join(DATA_SOURCES)} (default: what the profile says)")
    run.add_argument("--only", metavar="NN,NN", help="some notebooks, by number or name: 00,02")
    run.add_argument("--out", metavar="DIR", help="default: <profile>-<data> in PRIMIA_LITE_RUNS or runs/")
    run.add_argument("--skip-bad", action="store_true", help="leave out films that can't be read")
    run.add_argument("--jobs", type=int, metavar="N", help="run N side by side (default: 2 in profile smoke, else 1)")
    run.add_argument("--fresh", action="store_true", help="don't resume what a killed run left")
    command("doctor", _doctor, "check this machine and list the data sources")
    data = command("data", _data, "list the data sources, or describe one")
    data.add_argument("source", nargs="?", help=", ".join(DATA_SOURCES))
    data.add_argument("--size", type=int, default=64, help="side of a film in px (default: 64)")
    data.add_argument("--n-films", type=int, help="about this many films (default: all; phantom: 1000)")
    data.add_argument("--seed", type=int, default=0)
    data.add_argument("--skip-bad", action="store_true", help="leave out films that can't be read")
    data.add_argument("--sheet", metavar="PNG", help="save a contact sheet: films of each class, side by side")


def _service_arguments(command: Callable[..., argparse.ArgumentParser]) -> None:
    serve = command("serve", _serve, "offer models for encrypted diagnosis, by HTTP")
    serve.add_argument("models", nargs="*", metavar="[NAME=]FILE", help="models saved by ModelCard.save")
    serve.add_argument("--demo", action="store_true", help="train a small model on phantom films, and offer it")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--behind-proxy", metavar="IP", help="of a reverse proxy that brings requests (docs/service.md)")
    serve.add_argument("--workers", type=int, help="processes that compute (default: one for each core, at most 4)")
    serve.add_argument("--no-limits", action="store_true", help="no limits on sessions and queries, for benchmarks")
    diagnose = command("diagnose", _diagnose, "encrypt a film, and have it diagnosed by a service")
    diagnose.add_argument("film", metavar="FILM", help="a PNG or JPEG file")
    diagnose.add_argument("--url", default="http://127.0.0.1:8000", help="of the service")
    diagnose.add_argument("--model", help="its name there (default: the only one)")
    diagnose.add_argument("--ca-file", metavar="PEM", help="certificate to trust, for https")


def _run(args: argparse.Namespace) -> int:
    from primia_lite.apps.runner import run_notebooks

    return run_notebooks(
        args.profile, source=args.data, only=args.only, out=args.out, skip_bad=args.skip_bad, fresh=args.fresh,
        jobs=args.jobs,
    )  # fmt: skip


def _audit(args: argparse.Namespace) -> int:
    from primia_lite.apps.audit import command

    return command(args)


def _doctor(args: argparse.Namespace) -> int:
    from primia_lite.apps.doctor import doctor

    return doctor()


def _data(args: argparse.Namespace) -> None:
    from primia_lite.apps import describe
    from primia_lite.data import load

    if args.source is None:
        print(describe.list_sources())
        return
    films = load(args.source, args.size, n_films=args.n_films, seed=args.seed, skip_bad=args.skip_bad)
    print(describe.table(films))
    if args.sheet:
        print(f"contact sheet: {describe.save_sheet(films, args.sheet)}")


def _ledger(args: argparse.Namespace) -> None:
    from primia_lite.apps.describe import ledger

    print(ledger(args.file))


def _serve(args: argparse.Namespace) -> int:
    from primia_lite.apps.service.commands import serve

    return serve(
        args.models, demo=args.demo, host=args.host, port=args.port, proxy=args.behind_proxy,
        limits=not args.no_limits, workers=args.workers,
    )  # fmt: skip


def _diagnose(args: argparse.Namespace) -> None:
    from primia_lite.apps.service.commands import diagnose

    print(diagnose(args.film, args.url, args.model, args.ca_file))


def _bench(args: argparse.Namespace) -> int | None:
    from primia_lite.apps import bench

    if args.name is not None:
        return bench.run(args.name, args.arguments)
    print(bench.listing())


if __name__ == "__main__":
    sys.exit(main())
