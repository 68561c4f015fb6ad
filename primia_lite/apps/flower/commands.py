"""``primia-lite deploy``: a federation over Flower. docs/flower.md tells the steps."""

from __future__ import annotations

import tomllib
from pathlib import Path

from primia_lite.apps.flower import deploy
from primia_lite.apps.flower.folder import LINK, SERVER, require_flower, unreached
from primia_lite.config import UserError


def add_arguments(parser) -> None:
    """The subcommands of ``primia-lite deploy``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, what: str, function, folder: str = "the federation's folder"):
        added = actions.add_parser(name, help=what)
        added.add_argument("folder", type=Path, metavar="FOLDER", help=folder)
        added.set_defaults(deploy=function)
        return added

    def films(parser) -> None:
        parser.add_argument("--data", default="phantom", metavar="SOURCE", help="source of the films (phantom)")
        parser.add_argument("--root", metavar="DIR", help="where the films lie")
        parser.add_argument("--size", type=int, default=64, help="side of a film in px (64)")
        parser.add_argument("--n-films", type=int, help="about this many films")

    def study(parser) -> None:
        parser.add_argument("--rounds", type=int, default=40, help="at most so many, over which the budget lasts (40)")
        parser.add_argument("--epsilon", type=float, default=8.0, help="each hospital's privacy budget (8)")
        parser.add_argument("--no-dp", action="store_true", help="train without differential privacy")
        parser.add_argument("--model", default="litenet", help="litenet, scatternet, ckksnet or resnet18 (litenet)")
        parser.add_argument(
            "--settings", type=Path, metavar="TOML", help="[training], [privacy], [schedule], [timeouts]"
        )
        parser.add_argument("--port", type=int, default=9200, help="where the server listens (9200)")

    init = action("init", "make server and hospitals in one folder, for a trial on one machine", _init)
    init.add_argument("--hospitals", default="A,B,C", help="names (A,B,C)")
    films(init)
    study(init)

    hospital = action("hospital", "make a hospital's keys and its card", _hospital, "its name is the hospital's")
    films(hospital)
    hospital.add_argument("--unit", default="patient", help="what is protected: patient or film; film without DP")
    hospital.add_argument("--declared", type=int, help="their number, made public (the true one, rounded to tens)")

    server = action("server", "make the server's part and a study, from the hospitals' cards", _server)
    server.add_argument("--cards", type=Path, nargs="+", required=True, metavar="CARD", help="card.json of each")
    server.add_argument("--host", nargs="+", required=True, help="where it listens, then names by which it is reached")
    study(server)

    join = action("join", "show a study, and take it at a hospital", _join, "the hospital's folder")
    join.add_argument("--study", type=Path, required=True, help="study.json, from the server's operator")
    join.add_argument("--ca", type=Path, required=True, help="ca.crt, from the server's operator")
    join.add_argument("--superlink", required=True, metavar="HOST:PORT", help="where the server is")
    join.add_argument("--yes", action="store_true", help="don't ask")

    action("start", "start what the folder holds", _start)
    for name, what in {"run": "train", "simulate": "train on Flower's simulation (Ray): no processes to start"}.items():
        begin = action(name, what, _train)
        begin.add_argument("--rounds", type=int, help="in all (those of the study)")
        begin.add_argument("--fresh", action="store_true", help="start anew; what was charged to ledgers stays charged")
    action("status", "what runs", _status)
    action("stop", "end what runs", _stop)


def _films(args) -> dict:
    root = args.root and str(Path(args.root).resolve())
    films = {"source": args.data, "size": args.size, "root": root, "n_films": args.n_films}
    return {key: value for key, value in films.items() if value is not None}


def _study_options(args) -> dict:
    try:
        settings = tomllib.loads(args.settings.read_text("utf-8")) if args.settings else {}
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{args.settings} can't be read: {error}") from error
    return {
        "port": args.port, "rounds": args.rounds, "target_epsilon": None if args.no_dp else args.epsilon,
        "model": args.model, "settings": settings,
    }  # fmt: skip


def _init(args) -> None:
    require_flower()
    from primia_lite.apps.flower.setup import make_all
    from primia_lite.federation.study import describe

    names = [name.strip() for name in args.hospitals.split(",")]
    print(describe(make_all(args.folder, names, _films(args), **_study_options(args))))
    print(f"next: primia-lite deploy start {args.folder}")


def _hospital(args) -> None:
    require_flower()
    from primia_lite.apps.flower.card import make_hospital

    card = make_hospital(args.folder, _films(args), args.unit, args.declared)
    print(f"hospital {card['name']} declares {card['declared']} {card['unit']}s, key {card['identity']}")
    print(f"next: give {args.folder / 'card.json'} to the server's operator; all else in the folder stays there")


def _server(args) -> None:
    require_flower()
    from primia_lite.apps.flower.card import read_card
    from primia_lite.apps.flower.setup import make_server
    from primia_lite.federation.study import describe

    cards = [read_card(path) for path in args.cards]
    print(describe(make_server(args.folder / SERVER, cards, hosts=args.host, **_study_options(args))))
    print(f"next: give {args.folder}/server/study.json and ca.crt to each hospital")


def _join(args) -> None:
    require_flower()
    from primia_lite.apps.flower.setup import join
    from primia_lite.federation.study import Study, describe
    from primia_lite.federation.untrusted import read_file

    study, ca = read_file(args.study, str(args.study)), read_file(args.ca, str(args.ca))
    print(describe(Study.from_bytes(study)))
    if not args.yes and input("Compare the keys with the hospitals by telephone. Join? [y/N] ").strip().lower() != "y":
        raise UserError("not joined")
    join(args.folder, study, ca, args.superlink)
    print(f"next: primia-lite deploy start {args.folder.parent}")


def _start(args) -> None:
    started = deploy.start(args.folder)
    print(f"started: {', '.join(started)}")
    for line in unreached(args.folder, [name for name in started if name != LINK]):
        print(line)


def _status(args) -> None:
    print(deploy.status(args.folder))


def _stop(args) -> None:
    print(f"stopped: {', '.join(deploy.stop(args.folder)) or 'nothing ran'}")


def _train(args) -> None:
    train = deploy.run if args.action == "run" else deploy.simulate
    done = train(args.folder, args.rounds, fresh=args.fresh)["done"]
    print(f"{done} rounds are done: the model is {args.folder / SERVER / 'run' / 'model.pt'}")
