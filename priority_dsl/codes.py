"""The one table of codes: what each means, with a bad and a good example."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Code:
    """What a code stands for: its title, one line of explanation, a text that has it and one that has not."""

    title: str
    explanation: str
    bad: str
    good: str
    is_call: bool = False  # the examples are Python calls rather than rules


CODES: dict[str, Code] = {
    "PD101": Code(
        "unexpected character",
        "The language does not have this character outside strings and comments.",
        "mass(ref) >= 0.5 & p_on > 0.1",
        "mass(ref) >= 0.5 and p_on > 0.1",
    ),
    "PD102": Code(
        "unexpected word or sign",
        "The word or sign exists but cannot stand here, or the statement stops too early.",
        "2 p_on",
        "2 * p_on",
    ),
    "PD103": Code(
        "bracket without a partner",
        "A bracket is never closed, or a closing one closes nothing.",
        "max(p_on, 0.1",
        "max(p_on, 0.1)",
    ),
    "PD104": Code(
        "string without an end",
        'A string ends on its line with `"`, a description somewhere below with three of them.',
        'label == "neg',
        'label == "neg"',
    ),
    "PD105": Code(
        "text too long",
        "A rule has at most 20,000 characters.",
        "weight = 1" + 20_000 * " ",
        "weight = 1",
    ),
    "PD106": Code(
        "too deep",
        "An expression has at most 100 levels, a chain of operators counts one for each.",
        "p_on" + 100 * " + p_ref",
        "p_on + 100 * p_ref",
    ),
    "PD107": Code(
        "reserved word as a name",
        "Keywords, scopes and `inf` cannot be the name of anything.",
        "param batch = 8; weight = p_on / batch",
        "param size = 8; weight = p_on / size",
    ),
    "PD108": Code(
        "statement repeated or out of place",
        "A description comes first, an expression alone comes last, and what says one thing is said once.",
        "weight = p_on; weight = p_ref",
        "weight = p_on * p_ref",
    ),
    "PD109": Code(
        "unknown choice",
        "Only a few words can stand here.",
        "over = prompt; weight = p_on",
        "over = all; weight = p_on",
    ),
    "PD112": Code(
        "empty rule",
        "A rule says something: a weight, a loss or what to keep.",
        "param tau = 0.5",
        "param tau = 0.5; weight = mass(ref) >= tau",
    ),
    "PD110": Code(
        "empty range",
        "A declared range holds no number.",
        "param tau = 0.5 in [1, 0]; weight = p_on ** tau",
        "param tau = 0.5 in [0, 1]; weight = p_on ** tau",
    ),
    "PD111": Code(
        "`if` without `else`",
        "Only the outermost `if` of `weight` may leave out its `else`, which is 1.",
        "let w = 2 if p_on > 0.5; weight = w",
        "let w = 2 if p_on > 0.5 else 1; weight = w",
    ),
    "PD113": Code(
        "`weight` read where there is none",
        "Only `loss`, and a `let` after `weight = ...`, may read `weight`.",
        "let w = weight * 2; weight = w",
        "weight = p_on; loss = weight * nll_on",
    ),
    "PD201": Code(
        "no such library rule",
        "A single name stands for a rule of the library.",
        "prift_mas",
        "prift_mass",
    ),
    "PD202": Code(
        "rule file that cannot be read",
        "An argument that ends in `.rule` is a path.",
        "no_such_folder/mine.rule",
        "prift_mass",
    ),
    "PD203": Code(
        "unknown name",
        "The name is no statistic of a model, parameter, column, `let` or word.",
        "p_onn >= 0.5",
        "p_on >= 0.5",
    ),
    "PD204": Code(
        "word without its arguments",
        "A statistic needs its model, a function its arguments.",
        "mass >= 0.5",
        "mass(ref) >= 0.5",
    ),
    "PD205": Code(
        "name declared twice",
        "A name is declared once and is no word of the language.",
        "param p = 1; weight = p",
        "param q = 1; weight = q * p_on",
    ),
    "PD206": Code(
        "value that nothing reads",
        "A value is given for a name that the rule does not read.",
        'check("mass(ref) >= 0.5", tau=2)',
        'check("mass(ref) >= tau", tau=0.5)',
        is_call=True,
    ),
    "PD207": Code(
        "unknown function",
        "The name before the bracket is no function, statistic or view.",
        "relu(p_on)",
        "max(p_on, 0)",
    ),
    "PD208": Code(
        "unknown model",
        "A statistic reads `on`, `ref` or a declared model.",
        "p(teacher)",
        'model teacher "a larger model"; weight = p(teacher)',
    ),
    "PD209": Code(
        "symbol that is also a name",
        "The right side of a category test has a value of its own here.",
        "param neg = 1; weight = neg if label == neg else 1",
        'param neg = 1; weight = neg if label == "neg" else 1',
    ),
    "PD210": Code(
        "value that a category never has",
        "The column or word lists its values, and this is none of them.",
        "0 if role == asistant else 1",
        "0 if role == assistant else 1",
    ),
    "PD213": Code(
        "rule that cannot be read here",
        "A rule inside another is its weight: it has no loss, no `over`, `normalize` or `keep` of its own, "
        "and "
        "does not read itself.",
        'rule("asft") * 0.5',
        'rule("dft") * 0.5',
    ),
    "PD214": Code(
        "declared otherwise in a rule inside",
        "A column or model that two rules read is declared the same way in both.",
        'column label: bool; weight = rule("forgetting_table") if label else 1',
        'column label: {pos, neg}; weight = rule("forgetting_table") if label == pos else 1',
    ),
    "PD301": Code(
        "number used as a condition",
        "`if`, `and`, `or` and `not` need a condition.",
        "1 if p_on else 0",
        "1 if p_on > 0.5 else 0",
    ),
    "PD302": Code(
        "wrong kind of value",
        "Text, categories and models are no numbers, and a number is no category.",
        "column label: category; weight = label * 2",
        "column label: category; weight = label == good",
    ),
    "PD303": Code(
        "call that does not fit",
        "Too many or too few arguments, or a name that the word does not have.",
        "mass(ref, tie=exclude)",
        "mass(ref, ties=exclude)",
    ),
    "PD304": Code(
        "bad option",
        "The option takes a whole number of at least 1, or one of a few words.",
        "topk_entropy(on, 0.5)",
        "topk_entropy(on, 20)",
    ),
    "PD305": Code(
        "value that differs where one is needed",
        "A view takes one number for the whole model.",
        "nll(tempered(on, p_on))",
        "nll(tempered(on, 2))",
    ),
    "PD306": Code(
        "weight that the loss ignores",
        "A rule that gives a weight and a loss reads the weight in the loss.",
        "weight = p_on; loss = nll_on",
        "weight = p_on; loss = weight * nll_on",
    ),
    "PD307": Code(
        "value outside its range",
        "A parameter's value is a number inside its declared range.",
        "param tau = 2 in [0, 1]; weight = mass(ref) >= tau",
        "param tau = 0.5 in [0, 1]; weight = mass(ref) >= tau",
    ),
    "PD308": Code(
        "not a scope",
        "A reduction goes over one of example, batch, dataset, chunk(k), window(k), draws(n); a scope is no "
        "value.",
        "mean(p_on, ref)",
        "mean(p_on, example)",
    ),
    "PD309": Code(
        "certainly no number",
        "A division, power, logarithm or constant that can give no finite number; a chance outside [0, 1].",
        "p_on / 0",
        "p_on / 2",
    ),
    "PD310": Code(
        "loss without gradient",
        "No `on` statistic outside `sg(...)`: the loss would train nothing.",
        "loss = nll_ref",
        "loss = nll_on",
    ),
    "PD311": Code(
        "not known before training",
        "What goes over the data set, and `keep`, is computed before training, from columns and frozen "
        "models.",
        "top(p_on, 0.5, dataset)",
        "top(p_ref, 0.5, dataset)",
    ),
    "PD312": Code(
        "gradient through a reduction",
        "Gradient flows through `sum`, `mean` and `suffix_sum` of an example or a part of one only.",
        "loss = nll_on * mean(nll_on, batch)",
        "loss = nll_on * sg(mean(nll_on, batch))",
    ),
    "PD313": Code(
        "not a regex",
        "What `span`, `after` or `before` is given is no regex of the `regex` package, or repeats too much.",
        'after("(")',
        r'after("\(")',
    ),
    "PD314": Code(
        "nothing outside the response",
        "`unprompted` and `reading` read the response without the row's prompt, so a rule over all tokens "
        "cannot read them.",
        "over = all; weight = p(unprompted(ref))",
        "weight = p(unprompted(ref))",
    ),
    "PD315": Code(
        "draws that do not fit",
        "Over `draws(n)` goes a sum, mean, quantile or deviation of a value in which something is drawn, and "
        "is not drawn n times already.",
        "mean(p_ref, draws(30))",
        "mean(p(perturbed(ref, 5)), draws(3))",
    ),
    "PD401": Code(
        "ascent without end",
        "The weight can be negative and the loss has no lower bound.",
        "-1 if p_on < 0.1",
        "0 if p_on < 0.1",
    ),
    "PD402": Code(
        "constant weight",
        "A constant other than 1 only scales the learning rate.",
        "2",
        "1",
    ),
    "PD403": Code(
        "selection that can be empty",
        "Nothing may be kept, and the denominator counts what is kept.",
        "normalize = kept; weight = p_on > 0.5",
        "normalize = tokens; weight = p_on > 0.5",
    ),
    "PD404": Code(
        "comparison that is always the same",
        "The ranges of the two sides leave one answer.",
        "p_on >= 0",
        "p_on > 0",
    ),
    "PD405": Code(
        "possibly no number",
        "The ranges allow a division by 0, a logarithm of 0 or a power without a value.",
        "1 / H_on",
        "1 / (1 + H_on)",
    ),
    "PD406": Code(
        "column that never varies",
        "The declaration of the column leaves a single value.",
        "column label: {good}; weight = label == good",
        "column label: {good, bad}; weight = label == good",
    ),
    "PD407": Code(
        "gradient through the factor of a loss",
        "A probability with gradient multiplies a loss term with gradient.",
        "loss = p_on * nll_on",
        "weight = p_on; loss = weight * nll_on",
    ),
    "PD408": Code(
        "declared and never read",
        "A parameter, model, column or `let` that nothing reads.",
        "param tau = 1; weight = p_on",
        "param tau = 1; weight = p_on ** tau",
    ),
    "PD501": Code(
        "model not given",
        "The rule reads a model that the call does not pass.",
        'compile_rule("prift_mass").loss(logits, targets)',
        'compile_rule("prift_mass").loss(logits, targets, models={"ref": ref})',
        is_call=True,
    ),
    "PD502": Code(
        "column not given",
        "The rule reads a column that the call does not pass.",
        'compile_rule("label == good").weights(logits, targets)',
        'compile_rule("label == good").weights(logits, targets, columns={"label": ["good", "bad"]})',
        is_call=True,
    ),
    "PD503": Code(
        "shapes that do not fit",
        "Logits are [..., V] for targets [...], columns have one value a token or a row.",
        'compile_rule("dft").loss(logits[:, :2], targets)',
        'compile_rule("dft").loss(logits, targets)',
        is_call=True,
    ),
    "PD504": Code(
        "bad value in a column",
        "A column's values fit its type and declared range.",
        'compile_rule("column s: number in [0, 1]; s * 1").weights(logits, targets, columns={"s": [0, 2]})',
        'compile_rule("column s: number in [0, 1]; s * 1").weights(logits, targets, columns={"s": [0, 1]})',
        is_call=True,
    ),
    "PD505": Code(
        "weight that is not finite",
        "A weight is infinite or no number.",
        'compile_rule("1 / (progress - 0.5)").weights(logits, targets, progress=0.5)',
        'compile_rule("1 / (progress - 0.5)").weights(logits, targets, progress=0.1)',
        is_call=True,
    ),
    "PD506": Code(
        "target outside the vocabulary",
        "A target has no logit in a model that the rule reads.",
        'compile_rule("prift_mass").loss(logits, targets, models={"ref": ref[..., :2]})',
        'compile_rule("prift_mass").loss(logits, targets, models={"ref": ref})',
        is_call=True,
    ),
    "PD508": Code(
        "no data-set rows",
        "Ties of a batch are broken by data-set row, so several micro-batches must say which rows they hold.",
        "top.loss(logits, targets, step=top.observe(logits, targets) + top.observe(logits, targets))",
        "top.loss(logits, targets, examples=rows, step=top.observe(logits, targets, examples=rows) "
        "+ top.observe(logits, targets, examples=rows + 2))",
        is_call=True,
    ),
    "PD509": Code(
        "not known before training",
        "A value over the data set needs the statistics of all of its rows, which one batch does not have.",
        'compile_rule("top(nll_ref, 0.5, dataset)").weights(logits, targets, models={"ref": ref})',
        'compile_rule("top(nll_ref, 0.5, dataset)")'
        '.weights(logits, targets, stored={"top(nll(ref), 0.5, dataset)": kept})',
        is_call=True,
    ),
    "PD510": Code(
        "half a pair",
        "A call has both responses of each pair: `examples` says which data-set row they share, the column "
        "`chosen` which of them was preferred.",
        'compile_rule("chosen(length)").weights(None, targets, columns={"chosen": [1, 0]}, examples=rows)',
        'compile_rule("chosen(length)")'
        '.weights(None, targets, columns={"chosen": [1, 0]}, examples=0 * rows)',
        is_call=True,
    ),
    "PD507": Code(
        "step without the counts",
        "The `step` was not made by `observe` of the same rule.",
        'compile_rule("normalize = kept; 1").loss(logits, targets, step=counts)',
        'compile_rule("dft").loss(logits, targets, step=compile_rule("dft").observe(None, targets))',
        is_call=True,
    ),
}
