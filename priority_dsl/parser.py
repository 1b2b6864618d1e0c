"""Text to tree: `parse` reads a rule and reports all its syntax errors together.

The text is cut into tokens once, the tokens into statements, and each statement is parsed alone, so a
broken one does not hide the mistakes of the others. The parser calls the builder as it reduces: no
syntax tree is ever held, nothing recurses, and a tree that grows too deep is stopped on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache

from lark import Lark, Token, UnexpectedToken

from priority_dsl.builder import Builder
from priority_dsl.diagnostics import Diagnostic, PriorityError, Source, Span, failure
from priority_dsl.library import grammar_path
from priority_dsl.nodes import Rule, Statement
from priority_dsl.spelling import DEEPEST, LONGEST, SURROGATE
from priority_dsl.syntax_errors import junk, misplaced, too_deep, unclosed, unexpected, unopened

MOST_REPORTED = 50  # findings of one text; a text of noise has thousands
OPENING = frozenset({"LPAR", "LSQB", "LBRACE"})
CLOSING = frozenset({"RPAR", "RSQB", "RBRACE"})
STATEMENT_WORDS = frozenset("DOC CITE PARAM MODEL COLUMN LET LOSS KEEP OVER NORMALIZE".split())
NOISE = frozenset({"UNCLOSED_DOC", "UNCLOSED_STRING", "FOREIGN", "JUNK"})


def parse(text: str, name: str = "<rule>") -> Rule:
    """The tree of a rule text; `name` is what messages call the text.

    Every node carries its span in characters of `text`.
    Raises `PriorityError` with all syntax errors of the text (PD101 to PD112), in reading order.
    """
    source = Source(text, name)
    if len(text) > LONGEST:
        message = f"the text has {len(text):,} characters; a rule has at most {LONGEST:,}"
        place = Span(LONGEST, LONGEST + 1)
        raise failure("PD105", message, "shorten its comments and descriptions", span=place, source=source)
    reader = _Reader(text)
    rule = reader.rule()
    if rule is None:
        raise PriorityError(replace(finding, source=source) for finding in _first(reader.findings))
    return rule


def _first(findings: list[Diagnostic]) -> list[Diagnostic]:
    """The findings in reading order, cut where a text is nothing but mistakes."""
    ordered = sorted(findings, key=lambda finding: finding.span or Span(0, 0))
    if len(ordered) > MOST_REPORTED:
        last = ordered[MOST_REPORTED - 1]
        more = f"{last.help}\n" if last.help else ""
        ordered[MOST_REPORTED - 1 :] = [replace(last, help=f"{more}there are more errors behind this one")]
    return ordered


class _EveryToken:
    """Makes Lark keep the tokens that are in no rule of the grammar."""

    always_accept = ("COMMENT", "NEWLINE", "SEMICOLON", "TRUTH", *sorted(NOISE))

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        return stream


@cache
def _grammar() -> Lark:
    return Lark(
        grammar_path().read_text(encoding="utf-8"),
        parser="lalr",
        lexer="basic",
        start="statement",
        postlex=_EveryToken(),  # type: ignore[arg-type]
        transformer=Builder(),  # type: ignore[arg-type]
        keep_all_tokens=True,
        maybe_placeholders=False,
    )


@dataclass
class _Piece:
    """The tokens of one statement and the comments that belong to it."""

    tokens: list[Token] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    trailing: str | None = None
    broken: bool = False


class _Reader:
    """One pass over one text; `findings` collects what is wrong."""

    def __init__(self, text: str):
        self.text = text
        self.findings: list[Diagnostic] = []
        self.unfinished = False  # whether the last statement stopped in the middle

    def rule(self) -> Rule | None:
        """The tree, or None where there are findings."""
        pieces, comments = self._split(self._tokens())
        statements: list[Statement | None] = []
        for piece in pieces:
            if self.unfinished and piece.tokens[0].type not in STATEMENT_WORDS | {"WEIGHT"}:
                continue  # the rest of an expression that was broken over two lines
            statements.append(self._statement(piece))
        self.findings += misplaced(statements)
        if self.findings:
            return None
        return Rule(statements=tuple(statements), comments=tuple(comments), span=Span(0, len(self.text)))  # type: ignore[arg-type]

    def _tokens(self) -> list[Token]:
        """All tokens; noise is reported, neighbouring noise as one."""
        tokens: list[Token] = []
        for token in _grammar().parse_interactive(self.text).lexer_thread.lex(None):  # type: ignore[arg-type]
            last = tokens[-1] if tokens else None
            if last is not None and token.type == last.type == "JUNK" and last.end_pos == token.start_pos:
                tokens[-1] = _token(last + token, last.start_pos or 0)
            else:
                tokens.append(token)
        for place, token in enumerate(tokens):
            if token.type in NOISE:
                self.findings.append(junk(token))
            elif hidden := SURROGATE.search(token):
                self.findings.append(junk(_token(hidden[0], (token.start_pos or 0) + hidden.start())))
                tokens[place] = token.update(value=SURROGATE.sub("?", token))
        return tokens

    def _split(self, tokens: list[Token]) -> tuple[list[_Piece], list[str]]:
        """The statements of the text, and the comments behind the last one."""
        pieces: list[_Piece] = []
        piece, stack = _Piece(), []
        behind: _Piece | None = None  # the statement that ended on this line
        for index, token in enumerate(tokens):
            if token.type == "COMMENT":
                comment = token.rstrip()
                if piece.tokens and not stack:
                    piece.trailing = comment
                elif behind is not None and not piece.tokens:
                    behind.trailing = comment
                else:
                    piece.comments.append(comment)
                continue
            if token.type == "NEWLINE" and stack and not _begins_statement(tokens, index + 1):
                continue
            if token.type == "NEWLINE" or (token.type == "SEMICOLON" and not stack):
                if stack:
                    self._leave_open(piece, stack)
                if piece.tokens:
                    pieces.append(piece)
                    behind, piece = piece, _Piece()
                if token.type == "NEWLINE":
                    behind = None
                continue
            self._bracket(token, piece, stack)
            piece.tokens.append(token)
        if stack:
            self._leave_open(piece, stack)
        if piece.tokens:
            pieces.append(piece)
        return pieces, [] if piece.tokens else piece.comments

    def _bracket(self, token: Token, piece: _Piece, stack: list[Token]) -> None:
        if token.type in NOISE:
            piece.broken = True
        elif token.type in OPENING:
            stack.append(token)
            if len(stack) == DEEPEST + 1:
                piece.broken = True
                self.findings.append(too_deep(Span(token.start_pos or 0, token.end_pos or 0)))
        elif token.type in CLOSING:
            if not stack or not _partners(stack[-1], token):
                piece.broken = True
                self.findings.append(unopened(token, stack[-1] if stack else None))
                while len(stack) > 1 and not _partners(stack[-1], token):
                    stack.pop()
            if stack:
                stack.pop()

    def _leave_open(self, piece: _Piece, stack: list[Token]) -> None:
        swallowed = any(token.type in ("UNCLOSED_STRING", "UNCLOSED_DOC") for token in piece.tokens)
        if len(stack) <= DEEPEST and not swallowed:
            self.findings.append(unclosed(stack[-1]))
        piece.broken = True
        stack.clear()

    def _statement(self, piece: _Piece) -> Statement | None:
        self.unfinished = False
        if piece.broken or len(self.findings) > MOST_REPORTED:
            return None
        parser, place = _grammar().parse_interactive(""), 0
        try:
            for place, token in enumerate(piece.tokens):  # noqa: B007
                parser.feed_token(token)
            place = len(piece.tokens)
            return _with_comments(parser.feed_eof(piece.tokens[-1]), piece)
        except PriorityError as error:
            self.findings += error.diagnostics
        except UnexpectedToken:
            self.unfinished = place == len(piece.tokens)
            self.findings.append(unexpected(piece.tokens, place, parser.accepts()))
        return None


def _partners(opening: Token, closing: Token) -> bool:
    """Whether a bracket can close another; a range may start with `[` and end with `)`."""
    return (opening.type == "LBRACE") == (closing.type == "RBRACE")


def _token(text: str, start: int) -> Token:
    """A token of noise that the lexer did not make."""
    return Token("JUNK", text, start_pos=start, end_pos=start + len(text))


def _begins_statement(tokens: list[Token], index: int) -> bool:
    """Whether a statement that no expression can hold starts at a token."""
    if index + 1 >= len(tokens):
        return False
    if tokens[index].type == "WEIGHT":
        return tokens[index + 1].type == "EQUAL"
    return tokens[index].type in STATEMENT_WORDS


def _with_comments(statement: Statement, piece: _Piece) -> Statement:
    if not piece.comments and piece.trailing is None:
        return statement
    return statement.model_copy(update={"comments": tuple(piece.comments), "trailing": piece.trailing})
