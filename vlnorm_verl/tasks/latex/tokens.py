r"""The words of a Math answer: its text, LaTeX or plain, as tokens for `latex.reading`.

Here is decided what stands for what (``\dfrac``, ``√``, ``np.sqrt``, ``\left(``), what is decoration (``$``, sizes,
colours, currency), and which letters are a unit or a text and which are variables. Nothing else is dropped.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple


class Token(NamedTuple):
    kind: str  # number, letter, name (\dot{x}), command, text, mark, begin, end
    text: str
    gap: bool = False  # white space before it


def word_set(words: str) -> set[str]:
    return set(words.split())


_SPELLINGS = {
    "=": "= ==",
    "≈": r"\approx \simeq \sim",
    "∈": r"\in",
    "<": r"< \lt",
    ">": r"> \gt",
    "≠": r"!= \ne \neq",
    "≤": r"<= \le \leq \leqslant \leqq",
    "≥": r">= \ge \geq \geqslant \geqq",
}
RELATIONS = {spelling: relation for relation, spellings in _SPELLINGS.items() for spelling in spellings.split()}
OPENING = {"(": "(", "[": "[", "{": "", r"\{": "{", r"\lbrace": "{", r"\langle": "(", r"\lbrack": "["}
CLOSING = {")": ")", "]": "]", r"\}": "}", r"\rbrace": "}", r"\rangle": ")", r"\rbrack": "]"}
FRACTIONS = {r"\frac", r"\dfrac", r"\tfrac", r"\cfrac"}
TRIGONOMETRIC = word_set("sin cos tan cot sec csc")
HYPERBOLIC = word_set("sinh cosh tanh coth")
FUNCTIONS = word_set("exp ln log lg abs floor ceil det max min gcd lcm")
FUNCTIONS |= {prefix + name for prefix in ("", "a", "arc") for name in TRIGONOMETRIC | HYPERBOLIC}
FUNCTIONS |= {f"ar{name}" for name in HYPERBOLIC}
_GREEK = word_set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho varrho sigma"
    " tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"
)
NAMES = {rf"\{name}" for name in _GREEK | word_set("hbar ell nabla partial angle triangle measuredangle odot")}
UNIT_LETTERS = set("mgshlLJKNWVACFTHMGSÅΩ")

# Commands without a meaning of their own: alone, or with their first argument.
_DROPPED = word_set(
    "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle textstyle scriptstyle"
    " limits nolimits mathbf boldsymbol bm pmb underline boxed fbox mathit mathnormal mathsf rm bf it bfseries hline"
    " hfill tiny small normalsize large Large LARGE huge Huge quad qquad thinspace medspace thickspace negthinspace"
    " ensuremath nobreak"
)
_DROPPED_WITH_ARGUMENT = word_set("color textcolor colorbox hspace vspace phantom hphantom tag label")
_LAYOUTS = word_set("aligned align align* gathered split equation equation*")
_TEXT = word_set(
    "text mbox hbox textbf textit textrm textnormal textsf texttt mathtt emph mathrm operatorname operatorname*"
)
_ACCENTS = word_set(
    "dot ddot bar overline hat widehat tilde widetilde vec overrightarrow check breve acute grave"
    " mathcal mathscr mathfrak mathbb"
)
_CONJUNCTIONS = {"and": "and", "land": "and", "wedge": "and", "&": "and", "": ",", "or": "or", "lor": "or", "vee": "or"}
_JOINS = {"and", "or", *"+-*/^_,;&:|", *RELATIONS, r"\cdot", r"\times", r"\pm", r"\cup", r"\cap"}
_BEFORE_FACTORS = {*_JOINS, *OPENING} - {"_"}
_KNOWN = _DROPPED | _TEXT | _ACCENTS | FUNCTIONS | word_set("end infty pm cdot times cup cap frac dfrac sqrt binom")
_KNOWN |= {command[1:] for command in (*NAMES, *RELATIONS, *OPENING, *CLOSING)}
_KNOWN |= word_set("sech csch sinc")  # not sec h
_GLUED = FUNCTIONS | _GREEK | {"leqslant", "geqslant"}  # to a letter behind them, in the golds of some training sets

# Behind a number these words, and those of four letters or more, are a unit.
_UNITS = word_set(
    "cm mm km nm um kg mg gm ft in yd mi lb lbs oz hr hrs min sec ms ml mL eV Hz kHz Pa kPa mph kmh deg mol"
)
_UNITS |= word_set("pct am pm st nd rd th erg pc kpc Mpc AU ly rad cal keV MeV GeV kJ MJ kW MW MHz GHz mA mV kV psi")
# Short words that are no product of variables.
_PROSE = word_set("not when where for mod than the to of but nor yes no odd")


def _greek(name: str) -> str:
    """Unicode's name of a Greek letter."""
    case = "CAPITAL" if name[0].isupper() else "SMALL"
    return f"GREEK {case} LETTER {name.upper().replace('LAMBDA', 'LAMDA')}"


def _fraction(character: str) -> str:
    numerator, denominator = Fraction(unicodedata.numeric(character)).limit_denominator(10).as_integer_ratio()
    return rf"\frac{{{numerator}}}{{{denominator}}}"


# Each replacement stands for every character in front of it.
_REPLACEMENTS = {
    "−–‐‑‒﹣－": "-",
    "\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}": " ",
    "\N{ZERO WIDTH SPACE}\N{ZERO WIDTH NO-BREAK SPACE}": "",
    "×": r"\times ",
    "·⋅∙": r"\cdot ",
    "÷⁄∕": "/",
    "±": r"\pm ",
    "∓": r"\mp ",
    "≤⩽≦": "<=",
    "≥⩾≧": ">=",
    "≠": "!=",
    "≈": r"\approx ",
    "∈": r"\in ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    "∞": r"\infty ",
    "√": "sqrt",
    "°º˚": r"^\circ ",
    "ħℏ": r"\hbar ",
    "℃": r"^\circ C",
    "℉": r"^\circ F",
    "\N{LATIN CAPITAL LETTER A WITH RING ABOVE}\N{ANGSTROM SIGN}": r"\AA ",
    "\N{MICRO SIGN}": r"\mu ",
    "\N{OHM SIGN}": r"\Omega ",
    "’′": "'",
    "，": ",",
    "（": "(",
    "）": ")",
    "＝": "=",
    "＞": ">",
    "＜": "<",
    "€£¥₹": r"\$",
    **{unicodedata.lookup(_greek(name)): rf"\{name} " for name in _GREEK if not name.startswith("var")},
    "ϕ": r"\phi ",
    **{character: _fraction(character) for character in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"},
}
_CHARACTERS = str.maketrans(
    {character: replacement for characters, replacement in _REPLACEMENTS.items() for character in characters}
)
# What commands are in a text that is a unit.
_UNIT_SIGNS = {
    r"\cdot": " ", r"^\circ": "°", r"\mu": "μ", r"\Omega": "Ω", r"\AA": "Å", r"_\odot": "sun", r"_{\odot}": "sun",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_VALUE = r"(?:[\d.$]|\\(?:[dt]?frac|sqrt|\$|pi|text)(?![A-Za-z]))"
_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, period = match["whole"], match["fixed"], match["period"].strip("{}()")
    numerator = int(whole + fixed + period) - int((whole + fixed) or "0")
    return rf"{{\frac{{{numerator}}}{{{(10 ** len(period) - 1) * 10 ** len(fixed)}}}}}"


_SPACES = r"(?:\s|~|\\[ ,:;!]|\\q?quad(?![A-Za-z]))*"
# f(x) = x for all real x, which leaves the value as it is. A narrower set, as in "for all x > 0", may not.
_FOR_ALL = (
    rf"(?<!\s),?{_SPACES}(?:\\forall|(?:\\text\s*\{{,?\s*)?for (?:all|every|any))(?![A-Za-z])"
    r"(?:[\s~${}]|\\text|\\[ ,:;!]|(?:(?:positive\s+)?integers?|real|rational|natural|complex|numbers?)(?![A-Za-z]))*"
    r"(?:[A-Za-z](?:\s*,\s*[A-Za-z])*)?(?:\s*\\in\s*\\mathbb\s*\{?\s*[NZQRC]\s*\}?(?:\^(?:\+|\{\+\}))?)?[\s$}.]*$"
)
_REWRITES = [
    (re.compile(pattern, re.DOTALL), replacement)
    for pattern, replacement in (
        (_FOR_ALL, ""),
        (r"^\s*(\*\*|`)(.*)\1\s*$", r"\2"),
        (r"(?<![.\\])[.,;:](?=[$\s]*$)", ""),  # the end of a sentence, not "0.333..."
        (r"[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}"),
        (r"[₀₁₂₃₄₅₆₇₈₉]+", lambda match: f"_{{{match[0].translate(_SUBSCRIPTS)}}}"),
        (r"\{\s*\}(?=\s*\^)", ""),
        (r"\b(?:np|numpy|math|sympy|sp)\.(?:log\b|(?=[a-z]))", lambda match: "ln" if match[0].endswith("log") else ""),
        (r"(?<![A-Za-z\\])log(10|2)(?=\s*\()", r"\\log_{\1}"),
        (r"\((\d+)\)(?=_)", r"\1"),
        (r"\*\*", "^"),
        (r"\{\s*\\rm\b\s*([^{}]*)\}", r"\\mathrm{\1}"),
        (r"(?<![A-Za-z\\])d([A-Za-z])\s*/\s*d([a-z])(?![a-z])", r"\\frac{d\1}{d\2}"),
        (r"\\(?:left|right)\s*\.", ""),
        (r"\\not\s*=", r"\\neq "),
        (
            r"\\(?P<upright>operatorname\*?\s*\{\s*)?(arc)?(c?)tg(?![A-Za-z])(?(upright)\s*\})",
            lambda match: rf"\{match[2] or ''}{'cot' if match[3] else 'tan'} ",
        ),
        (r"\\mathring\s*(?:\{\s*A\s*\}|A(?![A-Za-z]))", r"\\AA "),
        # Plain text takes the whole number under a root, LaTeX the first digit.
        (rf"(?<![\\A-Za-z])sqrt\s*({_NUMBER})", r"\\sqrt{\1}"),
        (rf"∛\s*({_NUMBER})", r"\\sqrt[3]{\1}"),
        # Thousands: 12{,}345 12,\!345 12\,345 12 345
        (r"(?<=\d)(?:\{\s*,\s*\}|,\s*\\!)\s*(?=\d{3}(?!\d))", ""),
        (r"(?<![\d.,])\d{1,3}(?:(?:\\[,;: ]|~|[ ])\d{3})+(?!\d|,\d)", lambda match: re.sub(r"\D", "", match[0])),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
        (r"(?<=[\d}])\s+((?:[ck]?m|rad|J|N|W)/(?:s|h|m|K|kg)(?:\^?\{?\d\}?)?)\s*$", r"\\text{ \1}"),
        (r"(?<=[\d}])(?:\s|~|\\[ ,:;!])*(min|sec)\s*$", r"\\text{ \1}"),  # elsewhere these are functions
        (r"(?<![A-Za-z])([apAP])\.\s?[mM](?![A-Za-z])\.?", r"\1m"),
        # 0.1\overline{6} 0.\dot{3}, and 0.1(6) if the brackets can be no factor
        (r"(?P<whole>\d*)\.(?P<fixed>\d*)\\(?:overline|bar|dot)\s*(?P<period>\{\d+\}|\d)(?!\d)", _repeating),
        (r"(?<!\d)(?P<whole>0|\d+(?=\.\())\.(?P<fixed>\d*)(?P<period>\(\d+\))", _repeating),
    )
]


def _lexer(thousands: str) -> re.Pattern[str]:
    return re.compile(
        r"(?P<gap>(?:\s|~|\\[ ,:;!>]|\\$)+)|(?P<row>\\\\(?:\s*\[[^\]]*\])?)|(?P<delimiter>\\?\$|\\[()\[\]])"
        r"|\\(?P<edge>begin|end)\s*\{(?P<environment>[A-Za-z]+\*?)\}(?:(?<=array\})\s*\{[lcr|\s]*\})?"
        rf"|\\(?P<command>operatorname\*|[A-Za-z]+|.)|(?P<number>{thousands}{_NUMBER}(?:[eE][+-]?\d+(?![\d.A-Za-z]))?)"
        r"|(?P<word>[A-Za-z]+)|(?P<mark><=|>=|!=|==|.)",
        re.DOTALL,
    )


_SEPARATE, _GROUPED = _lexer(""), _lexer(r"\d{1,3}(?:,\d{3})+(?!\d|,\d)(?:\.\d+)?|")
AMBIGUOUS = re.compile(r"\d,\d{3}|\d[eE][+-]|\d[A-Za-z]{2}|[/:]|\\mu|\\Omega")  # `tokens_of` reads it in two ways


def _roman(letters: str) -> str:
    return rf"(?:\\(?:text|mathrm)\s*\{{\s*{letters}\s*\}}|{letters})"


# What is a unit or symbols, behind a number at the end: \mu m, k\Omega, M_\odot.
SYMBOL_UNIT = re.compile(
    rf"(?<=[\d}}])(?:\s|~|\\[ ,:;!])*(?:\\mu(?![A-Za-z])[\s~]*{_roman('(?:mol|eV|Pa|Hz|[gmslACFHJKLNTVW])')}"
    rf"|(?:{_roman('[mkMG]')}\s*)?\\Omega(?![A-Za-z])|{_roman('[LMR]')}\s*_\s*(?:\\odot|\{{\s*\\odot\s*\}}))"
    r"(?:\s*\^\s*(?:\d|\{-?\d\}))?[\s$]*$"
)


# The letter of a choice before its value: \textbf{(E)}\ 289, (E) 289; not (B)x, (A) \cap (B), (A) 1, (B) 2.
LABEL = re.compile(
    rf"[\s$]*(?:(?:\\(?:text|textbf|textrm)\s*\{{|\{{\s*\\bf\b)\s*\((?P<bold>[A-E])\)\s*\}}{_SPACES}(?=-?{_VALUE}|[A-Za-z(-])"
    rf"|\((?P<plain>[A-E])\)(?=\s|~|\\[ ,:;]|\\q?quad){_SPACES}(?={_VALUE}))(?!.*\([A-E]\))",
    re.DOTALL,
)
# (A), or more of them: a text that keeps its case.
CHOICES = re.compile(r"\W*[A-E](?:\W+[A-E])*\W*")


def rewritten(text: str) -> str:
    """The text in a spelling that has one sign for one thing."""
    if r"\begin" not in text:  # \\frac, of a text that was escaped twice
        text = re.sub(r"\\\\(?=([A-Za-z]{2,}))", lambda match: "\\" if match[1] in _KNOWN else match[0], text)
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def canonical(text: str) -> str:
    """A text that is equal for texts that differ in spacing, sizes, wrappers and the case of words only."""
    tokens = tokens_of(rewritten(text))
    return " ".join(" ".join(map(_folded, tokens)).split())


def _folded(token: Token) -> str:
    """Its text, of words in small letters; of choices as it is."""
    return token.text if token.kind != "text" or CHOICES.fullmatch(token.text) else token.text.casefold()


def words(tokens: list[Token]) -> str | None:
    """The text, if it has nothing but letters and punctuation; words in small letters."""
    if not all(token.kind in ("text", "letter") or token.text in ".,;(){}" for token in tokens):
        return None
    joined = "".join(" " * (token.gap or token.kind == "text") + _folded(token) for token in tokens)
    joined = re.sub(r"(?:\s*,|\s+and\b)+", " , ", re.sub(r"[^\w\s,]", " ", joined))
    return " ".join(joined.split()) or None


def tokens_of(text: str, second: bool = False) -> list[Token]:
    r"""The tokens of a text that is `rewritten`.

    ``second``: commas separate values, 2e-1 is e times two minus one, the letters of 2mg and the Ω of 2\text{Ω} are
    variables.
    """
    tokens: list[Token] = []
    position = depth = 0  # depth: brackets and matrices, in which a comma is no thousands separator
    gap = aligned = False
    lines = []  # where a line ends
    if second:
        text = re.sub(r"(?<![\w.])(\d+e)(?=[+-])", r"\1 ", text)
    while position < len(text):
        match = (_SEPARATE if second or depth else _GROUPED).match(text, position)
        assert match is not None
        assert match.lastgroup is not None
        kind, matched, position = match.lastgroup, match[match.lastgroup], match.end()
        if kind == "command" and matched not in _KNOWN and matched[:-1] in _GLUED:  # \cosx
            matched, position = matched[:-1], position - 1
        if kind == "gap" or (kind == "row" and not depth):
            gap = True
            if not depth and (kind == "row" or "\n" in matched):
                lines.append(len(tokens))
            continue
        if kind == "command" and matched in _TEXT | _ACCENTS | _DROPPED_WITH_ARGUMENT:
            content, position = _argument(text, position)
            if matched in _TEXT:
                tokens += _text_tokens(matched, content, gap, tokens, second)
            elif matched in _ACCENTS:
                tokens.append(Token("name", rf"\{matched}{{{content.replace(' ', '')}}}", gap))
        elif kind == "word":
            tokens += _word_tokens(matched, gap, tokens, second)
        elif kind == "number":
            tokens.append(Token(kind, matched.replace(",", "." if matched[0] == "0" else ""), gap))
        elif kind == "environment":
            if matched in _LAYOUTS:
                aligned = True
            else:
                tokens.append(Token(match["edge"], matched, gap))
                depth += 1 if match["edge"] == "begin" else -1
        elif kind == "row":
            tokens.append(Token("mark", r"\\", gap))
        elif kind == "command" and matched == "AA":
            tokens.append(Token("text", "Å", gap))
        elif kind == "command" and matched in _CONJUNCTIONS:
            tokens.append(Token("mark", _CONJUNCTIONS[matched], gap))
        elif kind in ("command", "mark") and matched not in _DROPPED and (matched != "&" or depth or not aligned):
            text_of = rf"\{matched}" if kind == "command" else matched
            tokens.append(Token(kind, text_of, gap))
            depth += (text_of in OPENING and text_of != "{") - (text_of in CLOSING)
        gap = False
    for index in reversed(lines):
        if tokens[:index] and tokens[index:] and not {tokens[index - 1].text, tokens[index].text} & _JOINS:
            tokens.insert(index, Token("mark", ";"))
    return tokens


def _argument(text: str, position: int) -> tuple[str, int]:
    """What a command applies to, a group, a command or one character, and where it ends."""
    while text[position : position + 1].isspace():
        position += 1
    if command := re.compile(r"\\[A-Za-z]+").match(text, position):
        return command[0], command.end()
    depth = 0
    for end in range(position, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[position : end + 1].removeprefix("{").removesuffix("}"), end + 1
    return text[position + 1 :], len(text)


def _text_tokens(command: str, content: str, gap: bool, before: list[Token], second: bool) -> list[Token]:
    r"""Of \text{…}, \mathrm{…} and their like: a conjunction, a function, a number and its unit, else a text."""
    content = re.sub(r"\\?\$|\\[ ,;:!]|~|\s", " ", content).replace(r"\%", "%").strip()
    if (bare := content.strip(" .,").lower()) in _CONJUNCTIONS:
        return [Token("mark", _CONJUNCTIONS[bare], gap)] if bare or "," in content else []
    if before and _is_value(before[-1]) and (match := re.fullmatch(r"(.*\w),?\s(and|or)", content)):  # 3 cm and 4 cm
        return [*_text_tokens(command, match[1], gap, before, second), Token("mark", match[2])]
    behind = bool(before) and (_is_value(before[-1]) or any(token.kind == "text" for token in before))
    unit = behind and content in _UNITS and "operator" not in command  # min, sec, psi
    if content in FUNCTIONS | _GREEK and not unit:
        return [Token("command", rf"\{content}", gap)]
    if match := re.match(r"[-+]?[\d.,:]+(?=\s+[A-Za-z])", content):
        return [*tokens_of(match[0]), _unit_token(content[match.end() :].strip(), True)]
    if behind and not second and re.match(r"\\Omega\b|\\mu\s+[A-Za-z]", content):
        return [_unit_token(content, gap)]
    if re.match(r"[-+(]?\s*[\d.]|[%\\]|\^(?!\\circ\s*[A-Za-z])", content):  # "°" alone counts in a sine
        return tokens_of(content)
    if content in ("e", "i") or (len(content) == 1 and before and command in ("mathrm", "operatorname")):
        return [Token("text" if behind and content in UNIT_LETTERS else "letter", content, gap)]
    return [_unit_token(content, gap)]


def _unit_token(content: str, gap: bool) -> Token:
    for command, sign in _UNIT_SIGNS.items():
        content = content.replace(command, sign)
    return Token("text", content.strip(), gap)


def _word_tokens(word: str, gap: bool, before: list[Token], second: bool) -> list[Token]:
    """Of letters: a function, a Greek letter, a conjunction, a unit behind a number, a text, else variables."""
    if word in FUNCTIONS or word in ("sqrt", "frac") or word in _GREEK - {"beta", "eta", "mu", "nu", "xi"}:
        return [Token("command", rf"\{word}", gap)]
    if word.lower() in ("infinity", "inf", "oo"):
        return [Token("command", r"\infty", gap)]
    if word in _CONJUNCTIONS:
        return [Token("mark", _CONJUNCTIONS[word], gap)]
    value, text = (before and _is_value(before[-1])), (before and before[-1].kind == "text")
    per = len(before) > 1 and before[-1].text == "/" and before[-2].kind == "text"
    unit = value and (word in _UNITS or word.lower() in ("am", "pm"))
    unit = unit and (gap or (not second and _may_have_unit(before)))
    if unit or word.lower() in _PROSE or (text and len(word) > 1) or per or (len(word) > 3 and (gap or not value)):
        return [Token("text", word, gap)]
    return [Token("letter", letter, gap and i == 0) for i, letter in enumerate(word)]


def _is_value(token: Token) -> bool:
    return token.kind == "number" or token.text in ("}", ")", "%")


def _may_have_unit(before: list[Token]) -> bool:
    r"""Whether the word that touches the last token can be its unit: 10cm, not \frac12mg, \mu_{k}mg, \frac{2mg}{k}."""
    texts = [token.text for token in before]
    factor = len(before) == 1 or texts[-2] in _BEFORE_FACTORS
    return factor and before[-1].kind == "number" and texts.count("{") == texts.count("}")
