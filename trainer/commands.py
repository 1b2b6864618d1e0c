"""The subcommands of `priority`: read the flags, call what does the work, print. Imports stand where used."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from priority_dsl import PriorityError
from trainer.faults import ConfigFault

if TYPE_CHECKING:
    from priority_dsl import CheckedRule
    from trainer.config import TrainConfig
    from trainer.flags import CommandParser

TRAIN_EXAMPLE = (
    "priority train --model MODEL --data train.jsonl --rule 'mass(ref) >= tau' --set tau=0.5 --output RUN"
)


def train(words: list[str]) -> int:
    """`priority train`: train a model under a rule."""
    from trainer.config import TrainConfig
    from trainer.flags import read_config
    from trainer.records.repeating import asked, settings

    about = (
        "Train a causal language model under a rule. OUTPUT then holds model, rule, config and log.\n"
        "--from RUN [--output NEW] repeats the run in the folder RUN on the same data and models; flags go\n"
        "over its settings, and --allow-changed repeats it on data or models that have changed."
    )
    if (earlier := asked(words)) is not None:
        config = read_config(
            TrainConfig, earlier.words, "priority train", about, TRAIN_EXAMPLE, settings(earlier)
        )
        from trainer.records.repeat import as_before

        with as_before(earlier, config):
            _train(config)
    else:
        _train(read_config(TrainConfig, words, "priority train", about, TRAIN_EXAMPLE))
    return 0


def _train(config: TrainConfig) -> None:
    if config.dry_run:
        from trainer.dryrun.report import dry_run

        dry_run(config)
    else:
        from trainer.train import train as run

        run(config)


def _parser(name: str, about: str, example: str) -> CommandParser:
    from trainer.flags import CommandParser

    return CommandParser(f"priority {name}", about, example)


def _values(pairs: list[str]) -> dict[str, float]:
    """Parameter values from NAME=NUMBER words."""
    values = {}
    for pair in pairs:
        name, tied, number = pair.partition("=")
        try:
            values[name.strip()] = float(number)
        except ValueError as error:
            raise ConfigFault(f"--set {pair}: must be NAME=NUMBER") from error
        if not tied or not name.strip():
            raise ConfigFault(f"--set {pair}: must be NAME=NUMBER")
    return values


def _add_rules(parser: CommandParser) -> None:
    parser.add_argument("rules", nargs="+", metavar="RULE", help="rule text, library name or .rule file")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=NUMBER", help="parameter value")


def _parse(parser: CommandParser, words: list[str]) -> Namespace:
    """Parse words; a rule that begins with a minus, such as `-p_on`, is not taken for a flag."""
    guarded = [f" {w}" if w[:1] == "-" and w[:2] != "--" and w != "-h" else w for w in words]
    flags = parser.parse_args(guarded)
    flags.rules = [rule[1:] if rule.startswith(" -") else rule for rule in flags.rules]
    return flags


def _headline(text: str, most: int = 70) -> str:
    first = text.strip().splitlines()[0] if text.strip() else "(empty)"
    return first if len(first) <= most else first[: most - 3] + "..."


def check(words: list[str]) -> int:
    """`priority check`: the regime and kinds of each rule, or all its mistakes; 2 if any has one."""
    parser = _parser(
        "check",
        "Check rules: prints what each is, or every mistake with its place and a way out.",
        "priority check 'mass(ref) >= 0.5' dft my.rule",
    )
    _add_rules(parser)
    parser.add_argument("--strict", action="store_true", help="warnings are errors")
    flags = _parse(parser, words)
    from priority_dsl import check as check_rule
    from trainer.strict import refuse_warnings

    values = _values(flags.set)
    failed = False
    for argument in flags.rules:
        try:
            rule = check_rule(argument, **values)
            if flags.strict:
                refuse_warnings(rule)
        except PriorityError as error:
            print(f"{_headline(argument)}\n{error}\n")
            failed = True
            continue
        print(f"{_headline(argument)}\n{_described(rule)}\n")
    return 2 if failed else 0


def _described(rule: CheckedRule) -> str:
    reads = {
        "models": rule.requires.models,
        "columns": rule.requires.columns,
        "parameters": [f"{name} = {p.value:g}" for name, p in rule.params.items()],
    }
    lines = [f"  {rule.regime}, weights in {rule.range}, one per {rule.weight.kind.extent}"]
    lines += [f"  {what}: {', '.join(sorted(names))}" for what, names in reads.items() if names]
    return "\n".join(lines + [str(warning) for warning in rule.warnings])


def explain(words: list[str]) -> int:
    """`priority explain`: everything that is derived of a rule; with a model and data also the figures."""
    parser = _parser(
        "explain",
        "Explain rules: regime, range, what they read, the plan and its cost, warnings. With --model\n"
        "and --data also the figures for them: tokens, bytes, forward passes, the share of extra compute.",
        "priority explain prift_mass --set tau=0.3",
    )
    _add_rules(parser)
    parser.add_argument(
        "--json", action="store_true", help="as JSON: one object, or a list for several rules"
    )
    parser.add_argument("--code", action="store_true", help="also the generated loss graph")
    parser.add_argument("--model", metavar="FOLDER", help="model that would be trained, with --data")
    parser.add_argument("--data", action="append", metavar="FILE", help="rows, with --model; repeatable")
    parser.add_argument("--bind", action="append", default=[], metavar="NAME=FOLDER", help="frozen model")
    parser.add_argument("--epochs", type=int, default=1, metavar="N", help="passes over the data (default 1)")
    parser.add_argument("--prompt", metavar="TEXT", help="field that holds the prompt, with --completion")
    parser.add_argument("--completion", metavar="TEXT", help="field that holds the response, with --prompt")
    parser.add_argument("--chat", action="store_true", help="put rows through the chat template")
    parser.add_argument("--max-length", type=int, metavar="N", help="longest row in tokens")
    parser.add_argument(
        "--bad-rows", choices=("refuse", "skip"), help="what happens to rows that cannot be used"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that a model brings with it"
    )
    flags = _parse(parser, words)
    from trainer.explaining import explain_rules

    return explain_rules(flags, _values(flags.set))


def fmt(words: list[str]) -> int:
    """`priority fmt`: rewrite rule files in canonical form, or print the canonical form."""
    parser = _parser(
        "fmt",
        "Rewrite rule files in canonical form; a rule text or a library name is printed.",
        "priority fmt rules/*.rule --check",
    )
    parser.add_argument("rules", nargs="+", metavar="RULE", help=".rule file, rule text or library name")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 2 if a file would change")
    parser.add_argument("--stdout", action="store_true", help="print in place of rewriting")
    flags = _parse(parser, words)
    changed = [argument for argument in flags.rules if _formatted(argument, flags.check, flags.stdout)]
    return 2 if flags.check and changed else 0


def _formatted(argument: str, check_only: bool, printed: bool) -> bool:
    """Format one argument; whether it is a file whose text was not canonical."""
    from priority_dsl import format_rule, parse
    from priority_dsl.library import resolve

    source = resolve(argument)
    text = format_rule(parse(source.text, source.name))
    path = Path(argument) if argument.strip().endswith(".rule") and "\n" not in argument.strip() else None
    if path is None or printed:
        print(text.rstrip("\n"))
        return False
    if text == source.text:
        return False
    if check_only:
        print(f"would reformat {path}")
        return True
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigFault(f"{path}: cannot be written: {error.strerror}") from error
    print(f"reformatted {path}")
    return True


def rules(words: list[str]) -> int:
    """`priority rules`: the library as a table of name, regime and what the rule says."""
    parser = _parser(
        "rules", "List the rules of the library: name, regime, what it says.", "priority rules prift"
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="only rules that show all of these words")
    flags = parser.parse_args(words)
    from priority_dsl import check as check_rule
    from priority_dsl import list_rules

    table = []
    for name in list_rules():
        rule = check_rule(name)
        row = (name, str(rule.regime), _headline(rule.doc or "(no description)", 100))
        if all(word.lower() in f"{' '.join(row)} {rule.doc}".lower() for word in flags.words):
            table.append(row)
    if not table:
        raise ConfigFault(f"no rule of the library shows {' and '.join(flags.words)}")
    widths = [max(len(row[column]) for row in table) for column in (0, 1)]
    for name, regime, doc in table:
        print(f"{name:{widths[0]}}  {regime:{widths[1]}}  {doc}")
    return 0


def new(words: list[str]) -> int:
    """`priority new`: write NAME.rule and test_NAME.py."""
    parser = _parser("new", "Write a rule file and its test, to start from.", "priority new my_rule")
    parser.add_argument("name", metavar="NAME", help="name of the rule: letters, digits and _")
    parser.add_argument("--folder", default=".", metavar="FOLDER", help="where to write (default: here)")
    flags = parser.parse_args(words)
    from trainer.scaffold import write_rule

    for path in write_rule(flags.name, Path(flags.folder)):
        print(f"wrote {path}")
    print(f"edit {flags.name}.rule, then: priority test {flags.name}.rule")
    return 0


def test(words: list[str]) -> int:
    """`priority test`: the properties of rules, and their equality with a function by hand."""
    parser = _parser(
        "test",
        "Test rules on drawn logits: range as derived, ignored tokens, order of the batch, finite\n"
        "gradient; --against compares with your own function (logits, targets, models, columns).",
        "priority test my_rule.rule --against test_my_rule:by_hand",
    )
    _add_rules(parser)
    parser.add_argument(
        "--against", metavar="MODULE:FUNCTION", help="the same weights, written by hand in torch"
    )
    parser.add_argument("--strict", action="store_true", help="warnings are errors")
    flags = _parse(parser, words)
    if flags.strict:
        from priority_dsl import check as check_rule
        from trainer.strict import refuse_warnings

        for argument in flags.rules:
            refuse_warnings(check_rule(argument, **_values(flags.set)))
    from trainer.properties import run_tests

    return run_tests(flags.rules, _values(flags.set), flags.against)


def evaluate(words: list[str]) -> int:
    """`priority eval`: measure a model."""
    from trainer.config import EvalConfig
    from trainer.flags import read_config

    config = read_config(
        EvalConfig,
        words,
        "priority eval",
        "Measure a model: held-out nll and accuracy; with --samples also Avg@k and Pass@k by a checker.",
        "priority eval --model RUN --data test.jsonl --samples 8 --checker gsm8k --k 1 --k 8",
    )
    from trainer.evaluate import evaluate as run
    from trainer.evaluate import table

    print(table(run(config)))
    return 0


def merge(words: list[str]) -> int:
    """`priority merge`: an adapter and its base as one model."""
    parser = _parser(
        "merge",
        "Add a LoRA adapter to the weights of its base, and write both as one model folder.",
        "priority merge --model RUN --output MODEL",
    )
    parser.add_argument("--model", required=True, metavar="FOLDER", help="adapter folder, left by --lora")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder for the model")
    flags = parser.parse_args(words)
    from trainer.merging import merge as run

    run(flags.model, flags.output)
    print(f"the model is in {flags.output}")
    return 0


def demo(words: list[str]) -> int:
    """`priority demo`: countdown under several rules."""
    parser = _parser(
        "demo",
        "Train a tiny model on noisy arithmetic under several rules, and compare what they do to it.\n"
        "Prints a table; writes demo_results.json, a picture and the trained models into OUTPUT.",
        "priority demo --rule 'sg(p_on) * (mass(ref) >= 0.5)'",
    )
    parser.add_argument(
        "--rule", action="append", default=[], metavar="RULE", help="a rule of yours; repeatable"
    )
    parser.add_argument("--output", default="demo_run", metavar="FOLDER", help="default: demo_run")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--write", metavar="DIR",
        help="train nothing: write the task into DIR, data, base model, base.yaml (for train and sweep), "
        "eval.yaml (for eval)",
    )  # fmt: skip
    flags = parser.parse_args(_tied(words, "--rule"))
    if flags.write is not None:
        from trainer.demo.files import write_files

        if flags.rule:
            raise ConfigFault("--write trains nothing, so --rule has no meaning with it")
        for path in write_files(Path(flags.write), flags.seed):
            print(f"wrote {path}")
        return 0
    # Steps this small mostly wait for the other thread: asleep, so that it gets the core. Torch reads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from trainer.demo.run import demo as run

    run(flags.output, flags.seed, flags.rule)
    return 0


def _tied(words: list[str], flag: str) -> list[str]:
    """The words with each value of a flag tied to it, so that `--rule -p_on` is not read as two flags."""
    tied: list[str] = []
    for word in words:
        if tied and tied[-1] == flag:
            tied[-1] = f"{flag}={word}"
        else:
            tied.append(word)
    return tied
