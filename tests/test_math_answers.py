r"""Which Math answers are equal: what is read as what, what is exact, and what is not read at all.

Covered: kinds of notation, each by a few answers that are equal and a few that are not; texts of which a part is not
understood; the tolerance; golds of the MATH and Minerva test sets. Not covered: limits of time and memory and the
worker processes (`tests/test_rewards_math.py`); the sets themselves (`benchmarks/math_rules.py` takes a file of them).
"""

from __future__ import annotations

import pytest
import sympy

from vlnorm_verl.tasks.latex.reading import read
from vlnorm_verl.tasks.latex.worker import load

compare = load()


def are_equal(gold: str, answer: str) -> bool:
    return bool(compare(gold, answer)["equal"])


# kind: (gold, answer) that are equal, then that are not
KINDS: dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
    "whole box": (
        [
            ("42", "\n42\n"), ("42", r"\[42\]"), ("42", r"\(42\)"), ("42", "$$42$$"), ("42", "~42"), ("42", "42\\"),
            ("42", "42."), ("42", r"\color{red}{42}"), ("42", r"\underline{42}"), ("42", r"\text{42}"),
            ("42", "**42**"), ("42", r"\large 42"), ("42", r"{\bf 42}"), ("42", r"\boxed{42}"),
            ("69, 84", "$69$,$84$"), ("x = 3", "x =\n3"), (r"\frac{1}{2}", r"\\frac{1}{2}"),
            ("x=3,y=7", r"\begin{aligned} x &= 3 \\ y &= 7 \end{aligned}"),
        ],
        [
            ("42", "1\n2\n3\n42"), ("7", "x = 3\ny = 7"), ("7", r"x = 3 \\ y = 7"), ("42", "41, 42"), ("7", "3 4 7"),
        ],
    ),
    "matrices": (
        [
            (r"\begin{pmatrix}1\\2\end{pmatrix}", "\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}"),
            (r"\begin{pmatrix}-5\\2\end{pmatrix}", r"\begin{bmatrix} -5 \\[4pt] 2 \end{bmatrix}"),
            (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\left(\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right)"),
            (r"\begin{pmatrix} 1/3 \\ 2 \end{pmatrix}", r"\frac13 \begin{pmatrix} 1 \\ 6 \end{pmatrix}"),
            ("-2", r"\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}"),
            ("-2", r"\det\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
            (r"\begin{pmatrix}-7\\16\\5\end{pmatrix}", "(-7,16,5)"), ("(-7,16)", r"\begin{pmatrix}-7&16\end{pmatrix}"),
            (r"\begin{pmatrix}-7\\16\end{pmatrix}", r"\langle -7,16\rangle"),
        ],
        [
            (r"\begin{pmatrix}3\\7\end{pmatrix}", "7"), (r"\begin{pmatrix}3\\7\end{pmatrix}", "(7,3)"),
            (r"\begin{pmatrix}3\\7\end{pmatrix}", "(3,7,0)"), (r"\begin{pmatrix}3\\7\end{pmatrix}", "[3,7)"),
            ("7", r"\begin{pmatrix}7\end{pmatrix}"), ("(1,2,3,4)", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
            (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
            ("-2", r"\det(\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}, 5)"),
        ],
    ),
    "programming notation": (
        [
            ("4.5e33", r"4.5 \times 10^{33} \, \text{erg/s}"), ("5.3E6", "5300000"), ("1e-05", "0.00001"),
            (r"6 \times 10^{13}", "6e13"), ("3e8", "3 x 10^8"), ("2e-1", "0.2"), (r"\ln 2", "np.log(2)"),
            ("2", "log10(100)"), ("2e-1", "2e - 1"), (r"\arcsin(10/13)", "np.arcsin(10/13)"),
            (r"\arcsin{\frac{1}{1.3}}", "np.arcsin(10/13)"), (r"2\sqrt{12}", "2*sqrt(12)"), ("x^2", "x**2"),
            (r"2\pi", "2*np.pi"), (r"2\pi \times 3", "2π×3"), (r"\sqrt{12}", "√12"), ("x^{-12}", "x⁻¹²"),
        ],
        [
            ("4.5e33", "4.5e32"), ("1e5", "1e-5"), (r"\arcsin(10/13)", "10/13"),
        ],
    ),
    "exact": (
        [
            (r"2\sqrt{3}", r"\sqrt{12}"), (r"\sqrt{5+2\sqrt{6}}", r"\sqrt2+\sqrt3"), ("x^2+2x+1", "(x+1)^2"),
            ("0.5", "1/2"), (r"\frac{\sqrt2}{4}\cos(t-\pi/4)", r"\frac14(\cos t+\sin t)"),
            (r"\binom{2n}{n}", r"\frac{(2n)!}{n!n!}"), (r"\frac{1}{2n+2}", r"\frac{1}{2(n+1)}"), (r"\ln 8", r"3\ln 2"),
            (r"\frac{d}{d+1}", r"\frac{d}{1+d}"), (r"\frac{d}{\delta}", r"d\delta^{-1}"),
            (r"\frac{d_1}{d_2}", "d_1/d_2"), (r"\frac{1}{d}", r"\frac{d}{d^2}"), ("a^{mn}", "(a^m)^n"),
            ("0", "(x+1)^2-x^2-2x-1"),
            (r"m+n-\gcd(m,n)", r"m-\gcd(n,m)+n"), ("6", r"\gcd(12,18)"),
        ],
        [
            (r"1.6 \times 10^{-19}", r"3.2 \times 10^{-19}"), (r"\frac{1}{20!}", r"\frac{1}{21!}"),
            ("0.0000002", "0.0000004"), (r"\left(\frac12\right)^{60}", r"\left(\frac12\right)^{61}"),
            ("1000000", "1000000.5"), ("123456.7", "123456.8"),
            (r"\frac{2^{1805}+1}{3 \cdot 2^{1806}}", r"\frac{1}{3 \cdot 2^{1806}}"), (r"\sqrt2", r"\sqrt2+10^{-100}"),
            (r"\pi", r"\frac{355}{113}"), ("x", "x+10^{-40}"),
            (r"\lfloor\frac{2n-1}{5}\rfloor", r"\lfloor\frac{2n-1}{6}\rfloor"), ("|x|", "x"), ("m", "-m"),
            (r"m+n-\gcd(m,n)", "m+n-1"), ("mn", r"\text{lcm}(m,n)"), ("1", r"\gcd(m,n)"), ("a^{mn}", "(a^m)^{n+1}"),
        ],
    ),
    "rounded": (
        [
            (r"\frac13", "0.333333"), (r"\frac16", "0.166667"), (r"\frac{1}{12}", "0.083333"), (r"\pi", "3.14159"),
        ],
        [
            (r"\frac13", "0.33333"), (r"\frac13", "0.33334"), (r"\sqrt2", "1.4142"),
            (r"\frac{10^{-9}}{3}", "0.0000000003"), ("1234567", r"1234565.0+\frac13"),
            ("2^{100}", r"1.26765\times10^{30}+\frac13"),
        ],
    ),
    "letters that are units too": (
        [
            (r"\frac{1}{m}t", r"\frac{t}{m}"), ("a g t", "a t g"), ("2x", "2 x"),
            (r"\frac{1}{3}ml^2", r"\frac{ml^2}{3}"), (r"\mu_{k}mg", r"\mu_k mg"), (r"\frac{2mg}{k}", "2mg/k"),
            (r"\frac12mg\sin\theta", r"\frac{mg\sin\theta}{2}"), (r"\mu_{s}mg\cos\theta", r"\mu_s gm\cos\theta"),
            (r"\frac12ml^2\omega^2", r"\frac{ml^2\omega^2}{2}"), (r"2mg\sin\theta", r"2gm\sin\theta"),
            ("2mg", "2 m g"), ("3mg-T", "-T+3gm"),
        ],
        [
            ("x", "x m"), (r"2\pi r", r"2\pi r h"), ("5", "5t"), (r"\pi(R^2-r^2)", "0"), ("5", r"5\text{x}"),
            (r"\frac{1}{3}ml^2", r"\frac13"), (r"\mu_{k}mg", r"\mu_{k}"), ("(M+m)gm", "M+m"), ("x_2mg", "x_2"),
            (r"\frac12mg", r"\frac12"), (r"\frac{2mg}{k}", r"\frac2k"), (r"\sqrt2mg", r"\sqrt2"),
            (r"2mg\sin\theta", r"2\sin\theta"),
        ],
    ),
    "letters that are functions too": (
        [
            ("P(1+r)^t", "(1+r)^t P"), ("P(1+r)^t", r"P\cdot(1+r)^t"), (r"\frac{h(a+b)}{2}", r"\frac{(a+b)h}{2}"),
            ("g(m_1+m_2)", "(m_1+m_2)g"), (r"\frac{G(M+m)}{r^2}", r"\frac{GM+Gm}{r^2}"), ("F(a+b)", "Fa+Fb"),
            (r"\frac{v^2}{g(1+\mu)}", r"\frac{v^2}{(1+\mu)g}"), (r"h(a+b)/2", r"\frac12(a+b)h"),
            (r"2mg(1-\cos\theta)", r"2gm(1-\cos\theta)"), ("A = P(1+r)^t", "A = (1+r)^t P"), ("ga+gb, 1", "1, g(a+b)"),
            ("f(2)+f(3)", "f(3)+f(2)"), ("f(x,y)", "f(x, y)"), ("f(x)^2", "f(x)f(x)"),
        ],
        [
            ("f(2)+f(3)", "f(5)"), ("f(0)", "0"), ("2f(3)", "3f(2)"), ("(1+r)^t P", "(P(1+r))^t"), ("f(x)=2x", "f=2x"),
            ("P(1+r)^t", "P(1+r)"), ("g(a+b)", "ga+b"), ("f(x)=2x", "f=2"),
        ],
    ),
    "units": (
        [
            ("10", r"10\text{ cm}"), ("10", "10 cm"), ("10", "10 square inches"), ("15", r"15\,\mathrm{cm}^2"),
            ("5", r"5\text{ m}"), ("5", r"5\ \mathrm{kg}\cdot\mathrm{m}^2\,\mathrm{s}^{-1}"),
            ("5", r"5\,\frac{\text{m}}{\text{s}}"), ("5", r"\text{5 m}"), ("18.90", r"\$18.90"), ("-5", r"-\$5"),
            ("90", r"90^\circ"), ("1950", r"1950\,^{\circ}\mathrm{C}"), ("120", r"120 \text{ ways}"),
            (r"\frac{1}{2}", r"\sin 30^\circ"), ("3000000", r"3 \text{ million}"), ("5", r"\$5/\text{hour}"),
            ("5", r"5\text{th}"), (r"864 \mbox{ inches}^2", "864"), ("10", "10cm"), ("500", "500ml"), ("5", "5th"),
            ("10", "10cm^2"), ("60", "60km/h"), ("(5,3)", "(5cm, 3cm)"), ("100000", "10^5kg"), ("2", "2mg"),
            ("5", r"5\,\mathrm{N\cdot m}"), ("5", r"5\,\text{N·m}"), ("5", r"5\,\mathrm{kg \cdot m^2/s^2}"),
            ("5", r"5\,\text{kg·m/s}"), ("6.63e-34", r"6.63 \times 10^{-34}\,\mathrm{J \cdot s}"),
            ("25", r"25 \text{ °C}"), ("25", r"25\,\mathrm{^\circ C}"), ("25", r"25\,\text{°C/W}"),
            (r"\frac12", r"\sin(30\text{°})"), ("5", r"5\text{ min}"), ("5", r"5\,\mathrm{sec}"),
            ("5", r"5\text{ psi}"), ("5", r"5\,\text{L}/\text{min}"), ("30", "30 min"), ("30", "30min"),
            ("5", r"5\,sec"),
            ("11/4", r"2\frac34\text{ inches}"), ("1.5", r"1\frac12 cups"), ("22.5", r"22\frac12^\circ"),
            ("5", r"5{}^\circ"), ("30", "30˚"),
            ("5", r"5\,\frac{\text{kg}\cdot\text{m}}{\text{s}^{2}}"),
            ("7", "7 seconds"), ("5", r"5\text{ three-digit numbers}"), ("5", r"5\text{ negative integers}"),
        ],
        [
            ("5", r"5\text{ million}"), ("2", r"1 \text{ hour } 20 \text{ minutes}"), ("5", r"5 \text{ or more}"),
            ("5", r"5\text{ (mod 7)}"), ("10", r"10\%\text{ of }x"), ("30", r"\sin(30\text{°})"),
            ("5", r"5\,\frac{\text{m}}{2\text{ s}}"),
        ],
    ),
    "symbols that are units too": (
        [
            ("2.45", r"2.45\,\AA"), ("2.45", r"2.45 \text{ \AA}"), ("2.45", r"2.45 \text{ Å}"),
            ("2.45", r"2.45\,\mathring{A}"), ("2.45", "2.45 \N{ANGSTROM SIGN}"),
            ("12", r"12 \text{ kΩ}"), ("12", r"12\,\text{k}\Omega"), (r"12\,\text{k}\Omega", "12"),
            ("12", r"12\,\text{Ω}"), ("12", r"12\,\mathrm{\Omega}"), ("12", r"12\,\Omega"), ("12", r"R = 12\,\Omega"),
            ("12", "12 \N{OHM SIGN}"), ("12", r"12\,\text{Ω·m}"), ("100000", r"$10^{5}\,\Omega$"),
            ("20", r"20\,\text{μm}"), ("20", r"20\,\mathrm{\mu m}"), ("20", r"20\,\mu\text{m}"), ("20", r"20\,\mu m"),
            ("20", "20 \N{MICRO SIGN}m"), ("20", r"20\,\mu m^{2}"), (r"20\,\text{μm}", "20"), (r"2\,\text{Ω}", "2"),
            ("5", r"5\,M_\odot"), ("5", r"5\,R_{\odot}"), ("5", r"5\text{ L}_\odot"), ("5", r"5 \text{ M}_\odot"),
            ("5", r"5\,\mathrm{R_\odot}"), ("5", r"5\,\mathrm{M}_{\odot}"),
            (r"20\mu m", r"20\,\mathrm{\mu m}"), (r"20\mu m", r"20m\mu"), (r"2\Omega", r"2\,\text{Ω}"),
            (r"2\Omega", r"\Omega+\Omega"), (r"3\mu", r"3\,\mathrm{\mu}"), (r"5M_\odot", r"5\,M_{\odot}"),
        ],
        [
            (r"20\mu m", "20"), (r"20\mu m", r"20\text{ m}"), (r"2\Omega", "2"), (r"3\mu", "3"), (r"5M_\odot", "5"),
            ("3", r"3\mu"), ("3", r"3\,\mathrm{\mu}"), ("20", r"20\mu mg"), ("1", r"\Omega"), ("1", r"\frac1\Omega"),
            ("2", r"2+\Omega"), ("2", r"2/\Omega"), ("2", r"2\Omega t"), ("x", r"x\Omega"), ("4x", r"4x^2\Omega"),
            (r"\frac{v}{2}", r"\frac{v}{2}\Omega"), (r"2\Omega", r"3\Omega"), (r"2\Omega", r"2\mu m"),
        ],
    ),
    "number words": (
        [
            (r"\frac{3}{10}", "3 tenths"), (r"\frac14", r"3 \text{ twelfths}"), (r"\frac25", r"\text{2 fifths}"),
            (r"\frac34", "3 quarters"), (r"\frac32", r"3 \text{ halves}"), ("0.05", r"5 \text{ hundredths}"),
            ("5000000", "5 millions"), ("5000", "5 thousands"), ("500000", r"5\text{ hundred thousand}"),
            ("5e15", "5 quadrillion"), ("5e7", r"5 \text{ crore}"), ("36", "3 dozen eggs"), ("20", "2 tens"),
            (r"5\pi", r"5\text{pi}"),
        ],
        [
            ("3", "3 tenths"), ("3", r"3 \text{ twelfths}"), ("2", "2 fifths"), ("2", r"\text{2 fifths}"),
            ("7", "7 eighths"), ("5", r"5 \text{ hundredths}"), ("5", r"5 \text{ millions}"), ("5", "5 thousands"),
            ("5", "5 dozens"), ("5", "5 quadrillion"), ("5", r"5 \text{ crore}"), ("5", r"5\text{pi}"),
            ("3", "3 quarters"), ("3", "3 halves"), ("3", "3 thirds"), ("500", r"5\text{ hundred thousand}"),
        ],
    ),
    "functions with an upright name": (
        [
            (r"2\arctan 2", r"2\operatorname{arctan}(2)"), (r"2\arctan 2", r"2\text{arctan}(2)"),
            (r"2\ln 3", r"2\mathrm{ln}3"), (r"\frac{\ln 3}{2}", r"\frac{1}{2}\operatorname{ln}(3)"),
            (r"\frac12\sin x", r"\frac12\mathrm{sin}x"), (r"(x+1)\ln x", r"(x+1)\operatorname{ln}(x)"),
            (r"x^2\ln x", r"x^{2}\mathrm{ln}x"), (r"2\sec x", r"2\operatorname{sec}(x)"),
            (r"\sinh^{-1}(1)", r"\ln(1+\sqrt2)"), (r"\sinh^{-1}(1)", r"\operatorname{arcsinh}(1)"),
            (r"\cosh^{-1}(2)", r"\ln(2+\sqrt3)"), (r"\tanh^{-1}\frac12", r"\frac12\ln 3"),
            (r"\coth^{-1}(2)", r"\operatorname{arcoth}(2)"),
            (r"\sqrt{2gh}\sin\theta", r"\sin\theta\sqrt{2gh}"), (r"e^{-t}\cos t", r"\cos t\, e^{-t}"),
            (r"(1+\cos x)\sin x", r"\sin x(1+\cos x)"), (r"2\ln x (x+1)", r"2(x+1)\ln x"),
            (r"\sin(2(x+1))", r"\sin 2(x+1)"), (r"\cos(\omega t)", r"\cos\omega t"),
        ],
        [
            (r"2\arctan 2", r"\operatorname{arctan}(2)"), (r"\sinh^{-1}(1)", r"\frac{1}{\sinh 1}"),
            (r"\coth^{-1}(2)", r"\tanh 2"), (r"\sin\theta\sqrt{2gh}", r"\sin(\theta\sqrt{2gh})"),
        ],
    ),
    "spellings": (
        [
            (r"4\piR^{2}", r"4\pi R^2"), (r"-2\cosx+C", r"-2\cos x+C"), (r"3\leqslantx\leqslant6", "[3,6]"),
            (r"\pii", r"\pi i"),
            (r"e^{\sinx}", r"e^{\sin x}"), ("(1,2)", "（1，2）"), ("x=5", "x＝5"), ("x>5", "x＞5"), (r"x\le 5", "x⩽5"),
            (r"x\ge 5", r"x\geqq 5"), (r"\tan x", r"\tg x"), (r"2\cot x", r"2\operatorname{ctg}x"),
            (r"\arctan 2", r"\arctg 2"),
            ("tg", "gt"),
        ],
        [
            (r"\sec h", r"\sech"), (r"x\in t", r"x\int"), (r"\piR", r"\pi"), (r"\cot x", r"\tg x"), ("x<5", "x＞5"),
        ],
    ),
    "degrees": (
        [
            (r"60^\circ", r"\frac{\pi}{3}"), (r"\frac{\pi}{4}", r"45^\circ"), (r"60^\circ", "60"),
            ("45", r"45.0^\circ"),
            (r"90^\circ-x", r"\frac{\pi}{2}-x"), (r"90^\circ-x", "90-x"), (r"x=\frac{\pi}{3}", r"60^\circ"),
            (r"[0,\frac{\pi}{2}]", r"[0^\circ,90^\circ]"), (r"(0,\frac{\pi}{2})", r"0^\circ<x<90^\circ"),
            (r"\{30^\circ,60^\circ\}", r"\{\frac{\pi}{6},\frac{\pi}{3}\}"), (r"(4,60^\circ)", r"(4,\frac{\pi}{3})"),
            (r"\arcsin\frac12", r"30^\circ"), (r"\frac12", r"\sin 30\degree"),
            (r"\frac12", r"\sin\left[30^\circ\right]"),
            (r"22\frac12^\circ", r"\frac{\pi}{8}"), (r"60^\circ+360^\circ k", r"\frac{\pi}{3}+2\pi k"),
        ],
        [
            ("60", r"\frac{\pi}{3}"), (r"\frac{\pi}{3}", "60"), ("0.785", r"45^\circ"), (r"60^\circ", r"\frac{\pi}{6}"),
            (r"25^\circ C", r"\frac{25\pi}{180}"), (r"\sin 30", r"\sin 30^\circ"), (r"30^\circ", r"30^\circ 15'"),
            (r"(0^\circ,90^\circ)", r"(0,\frac{\pi}{4})"), (r"f\circ g", r"g\circ f"),
        ],
    ),
    "choices with their values": (
        [
            ("289", r"\textbf{(E)}\ 289"), ("289", r"\text{(E) } 289"), ("289", r"(E)\ 289"),
            ("289", r"$\textbf{(E)} ~289$"),
            (r"\sqrt{30}", r"\textbf{(E)}\ \sqrt{30}"), ("(C)", r"\textbf{(C)}\ 25"), ("C", "(C) 25"),
            (r"(D) \ 1", "1"),
            (r"(D) \ 1", "D"), (r"(D) \ 1", r"\textbf{(D)} 1"), ("-2", r"\textbf{(A)}\ -2"), ("5", r"(A) \$5"),
            (r"\text{east}", r"\textbf{(C)} \text{ east}"), ("Bx", "(B)x"), ("B-2", "(B) - 2"), ("2A", r"(A) \times 2"),
            ("x+1", r"\textbf{(B)}\ x+1"),
        ],
        [
            ("289", r"\textbf{(E)}\ 28"), ("(C)", r"\textbf{(D)}\ 25"), (r"(D) \ 1", r"(D) \ 2"),
            (r"(D) \ 1", r"(E) \ 1"),
            ("e", "(E) 5"), ("C", r"(C) \text{ or } (D)"), ("C", r"(C) \text{ or } D"), ("C", "(C) 5, (D) 6"),
            ("C", "(C) 5 +"), (r"(D) \ 1", "C"),
        ],
    ),
    "percent": (
        [
            ("5", r"5\%"), ("0.05", r"5\%"), (r"50\%", r"\frac12"), ("12.5", r"12.5\text{ percent}"),
            (r"62.5\%", "62.5 %"), ("12.5", r"12\frac{1}{2}\%"), (r"33\frac13\%", r"\frac13"), ("22.5", "22 1/2%"),
            (r"0.75\%", r"3/4\%"), ("75", r"3/(4\%)"), ("50", r"10\div 20\%"), ("1.05x", r"x(1+5\%)"),
            ("3.04", r"3+4\%"), ("0.05", r"5\text{ percent.}"),
            ("p=0.05", r"p=5\%"), (r"p=5\%", "p=0.05"), ("t=3", r"t=3\text{ p.m.}"), ("x>0.5", r"x>50\%"),
        ],
        [
            (r"50\%", r"5000\%"), (r"50\%", "0.05"), ("75", r"3/4\%"), ("50", r"1/2\%"), ("7", r"3+4\%"),
            ("3", r"\frac{197}{99}+\frac{100}{99}\%"), ("p=0.05", r"p=50\%"), ("x>0.5", r"x<50\%"),
            (r"t=3\text{ a.m.}", r"t=3\text{ p.m.}"), ("p=0.05", r"20p=100\%"), ("12", "6/1(2)"), ("0.12", r"6/1(2)\%"),
        ],
    ),
    "roman letters": (
        [
            (r"1-\frac{1}{e}", r"1-\frac{1}{\mathrm{e}}"), (r"2\mathrm{e}", "2e"), (r"3+\mathrm{i}", "3+i"),
            ("3-i", "3-1i"), (r"-2+2\sqrt{3} i", r"2i\sqrt{3}-2"), ("E_1 + E_2", "E_{2} + E_{1}"),
            (r"2\hat{\theta}", r"\hat\theta 2"),
            (r"\frac{e^{t}}{3}", r"\frac{1}{3}\exp(t)"), (r"\gamma mc^2", "γmc²"), (r"\rho gh", "ρgh"),
            (r"\frac{\hbar}{2}", "ħ/2"), ("x_1", "x₁"), (r"\sqrt[3]{27}", "∛27"), (r"\frac18", "⅛"),
            ("-3", "\N{HYPHEN}3"),
        ],
        [
            (r"1-\frac{1}{\mathrm{e}}", "1"), (r"2\mathrm{e}", "2"), (r"3+\mathrm{i}", "3"), ("E_1", "E_2"),
        ],
    ),
    "thousands": (
        [
            ("12345", r"12\,345"), ("12345", "12,345"), ("12345", "12{,}345"), ("12345", r"12,\!345"),
            ("12345", "12 345"), (r"11,\! 111,\! 111,\! 100", "11111111100"), ("1234.5", "1,234.5"),
            ("100, 200", "100,200"), ("0.125", "0,125"), ("1200, 1300", "1,200, 1,300"),
            ("1200, 1300", r"1\,200, 1\,300"),
            ("1200, 1300", "1,200 and 1,300"), ("1000", "1\N{NO-BREAK SPACE}000"), ("1200, 5", "1,200, 5"),
        ],
        [
            ("345", "12 345"), ("1234", "(1,234)"), ("357", r"12\,345"),
        ],
    ),
    "numbers": (
        [
            ("3/2", r"1\frac12"), ("137.5", "137 1/2"), ("-3.5", r"-3\frac{1}{2}"), (r"\frac13", r"0.\overline{3}"),
            ("25", "025"), (r"\frac16", r"0.1\dot{6}"), (r"\frac13", "0.(3)"), ("142.0", "142"), ("6", "2(3)"),
            ("40", r"4\binom{5}{2}"), ("120", "5!"), ("3", r"\log_2 8"), ("1/2x", r"\frac{x}{2}"),
            ("1/2x", r"\frac{1}{2x}"), (r"4\sqrt{2}", r"4\sqrt(2)"), ("512", "2^3^2"),
        ],
        [
            ("4", r"4\sqrt(2)"), ("7", "5(2)"), ("16", r"\binom52\binom42"), ("2", "2^T"), ("0", "f(0)"),
        ],
    ),
    "bases": (
        [
            ("1011_2", "1011_{2}"), ("1011_2", "1011"), ("52_8", r"52_{\text{eight}}"), ("11_{10}", "11"),
            ("1011_2", "(1011)_2"),
        ],
        [
            ("1011_2", "1011_3"), ("1011_2", "13_8"), ("2104_5", "427_8"), ("52_8", "42_{10}"),
            ("11", "1011_2"), ("52_8", "25_8"), ("12", "12_2"),
        ],
    ),
    "ratios and times": (
        [
            ("1:2", "2:4"), ("3:5", "6:10"), (r"\frac12", "1:2"), ("1:2:3", "2:4:6"), ("3:30", r"3:30 \text{ p.m.}"),
            (r"\text{4:30 p.m.}", "4:30 pm"), ("9:16", r"\frac{9}{16}"), (r"\frac{9}{16}", "9:16"), ("16:25", "16/25"),
            ("1:12", r"\frac1{12}"), ("0.333333", "1:3"), ("1:3", "0.333333"),
            (r"\frac{8}{27}", "8 : 27"), ("9:16", "x = 9/16"), ("9:16", r"9:16 \text{ a.m.}"),
            ("9:16", "27:48"), ("9:05", "9:05"),
        ],
        [
            ("1:2:3", "1:3:2"), (r"\frac{1}{10}", "3:30"), (r"3 \text{ a.m.}", r"3 \text{ p.m.}"), ("1:2", "2:1"),
            ("10:30", "1:45"), (r"3:00 \text{ PM}", r"3:00 \text{ AM}"), ("1:2", "1, 2"),
            ("1:12", "2:24"), ("9:16", "18:32"), (r"\frac95", "9:05"), (r"\frac{9}{16}", "09:16"), ("9:16", "16:9"),
            (r"\frac{9}{16}", r"9:16 \text{ a.m.}"), ("9:16", "9"), ("7:30", "7.5"),
            ("1:2", "0:0"), ("1:2:3", "0:0:0"), ("0:1:2", "0:2:1"), ("1:2", r"\infty:\infty"),
            ("1:2", r"\begin{pmatrix}0\end{pmatrix}:\begin{pmatrix}0\end{pmatrix}"),
        ],
    ),
    "relations": (
        [
            ("x > 5", "5 < x"), (r"(5,\infty)", "x > 5"), ("[-2,7]", r"-2 \le x \le 7"), (r"x \in [-2,7]", "[-2,7]"),
            ("5", "x=5"), (r"(-\infty,-2]\cup[2,\infty)", r"x \le -2 \text{ or } x \ge 2"), ("y = 2x+3", "2x-y+3=0"),
            ("y=2x+3", "2x+3"), ("0<f(x)<1", "(0,1)"), ("3, -2", r"x = 3 \text{ or } x = -2"), ("(-3,3)", "|x|<3"),
            ("y=x", "x-y=0"), ("xy=1", r"y=\frac1x"), ("F=ma", r"a=\frac Fm"), ("x>y", "x-y>0"), ("x=a", "x-a=0"),
            ("(p,q)=(3,2)", "(3,2)"), (r"k \geqslant 2", "k >= 2"),
            ("f(x)=x", r"f(x) = x \text{ for all real } x"), ("f(x)=x", r"f(x) = x,\ \forall x \in \mathbb{R}"),
            ("f(n)=n", r"f(n) = n \quad \text{for all positive integers } n."),
            (r"f(n)=n \text{ for all } n", "f(n)=n"),
        ],
        [
            ("f(x)=x", r"f(x)=x \text{ for all } x > 0"), ("f(x)=x", r"f(x)=x, \forall x \ge 0"),
            ("x", r"2x \text{ for all } x"),
            ("f(x)=x", r"f(x)=x \text{ for all } x \ne 0"), ("f(x)=|x|", r"f(x)=x \text{ for all real } x"),
            ("f(x)=x", r"f(x)=x \text{ for all even integers } x"), (r"\mathbb{R}", r"\forall x \in \mathbb{R}"),
            ("< 5", "> 5"), (r"\geq 5", "5"), ("x > 5", r"x \ge 5"), ("x=1", "y=1"), ("f(x)=2x", "f(x)=3x"),
            (r"(5,\infty)", "x < 5"), ("5", r"\{x \mid x = 5\}"), ("6", "x=2, y=3"), ("x + y = 5", "5"),
            (r"\frac{dx}{dt}=kx", r"\frac{x}{t}=kx"),
            (r"\gcd(m,n)=1", "1"),
            ("x=2i", "x=3i"), (r"\sin x = 2", r"\sin x = 3"), ("2+3=5", "1=1"), (r"\emptyset", "3 = 2"),
            # The problem, said again.
            ("2, 3", "x^2-5x+6=0"), ("(-1,5)", "|x-2|<3"), (r"(1,\infty)", "3x+2<7x-2"), ("x>1", "3x+2<7x-2"),
            ("x=3", "5x-2=4x+1"), ("x=2", "x^3=8"), ("x=3", "2x=6"), (r"(-\infty,\ln 5)", "e^x<5"),
            ("x=3", r"\pi x = 3\pi"), (r"\{0,-\pi\}", r"x(x+\pi)=0"), ("x>0", r"\pi^x>1"),
            (r"(1,\infty)", r"3x+2<7x-2 \text{ or } 3x+2<7x-2"), ("2, 3", r"x^2-5x+6=0 \text{ or } x^2-5x+6=0"),
        ],
    ),
    "chains": (
        [
            ("5", "2+3=5"), ("5", "x = 2+3 = 5"), (r"\frac{22}{7}", r"\frac{22}{7} \approx 3.14"),
            (r"\frac{TM}{MK}=2", "2"), ("2^{10}-1=1023", "1023"), ("25+2=27", "27"),
            (r"\frac{22}{7}\approx 3.14", "3.14"),
            (r"\frac{13}{12}\approx 1.08", r"\frac{13}{12}"), (r"\frac{24}{145}\approx 0.17", r"\frac{24}{145}"),
            ("3.83e35", r"\approx 3.83 \times 10^{35}"), ("3.83e35", r"383123 \cdot 10^{30} \approx 3.83e35"),
        ],
        [
            ("2", "3 = 2"), ("42", "x = 41 = 42"), ("3", r"\frac{22}{7} \approx 3"), ("0", "x + y - 1 = 0"),
            ("27", "25+3=27"), ("25+2=27", "25"), ("25+3=27", "27"), (r"\frac1x=2", "2"), ("x-y=2", "2"), ("2=x", "x"),
            (r"\frac{24}{145}", r"\frac{24}{145}\approx 0.17"), (r"\frac{24}{145}\approx 0.17", "0.16"),
            ("100", r"100 \approx 101"), ("3.14", r"3.14 \approx 3.15"),
            ("100", r"\sin^2(1)+\cos^2(1)+99 \approx 101"),
        ],
    ),
    "several values": (
        [
            ("(1,2)", "( 1 , 2 )"), (r"\{1,2\}", r"\lbrace 2, 1 \rbrace"), ("1,-2", "-2,1"),
            (r"\frac{-3\pm\sqrt5}{2}", r"\frac{-3+\sqrt5}{2}, \frac{-3-\sqrt5}{2}"),
            (r"1 \pm \sqrt{19}", r"1+\sqrt{19},1-\sqrt{19}"), (r"\{1\pm\sqrt5,-2\}", r"-2, 1+\sqrt5, 1-\sqrt5"),
            ("(3, 7)", "\\left(\n3, 7\n\\right)"), ("(1,2),(3,4)", "(3,4) and (1,2)"),
            ("7,4", r"7 \text{ stuffed goats and } 4 \text{ toy helicopters}"),
            ("3,5", r"3\text{ cm, and }5\text{ cm}"),
            (r"AB=6\text{ cm}, DE=15\text{ cm}", r"AB = 6 \text{ cm and } DE = 15 \text{ cm}"),
            ("7, -2, -5", r"7, -2, \text{ and } -5"), (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"),
            (r"\mathbb{R}\setminus\{0\}", r"(-\infty,0)\cup(0,\infty)"), (r"\emptyset", r"\{\}"),
            ("(1,2,3)", r"\langle 1,2,3 \rangle"), ("p=5,q=2;p=7,q=2", "(5,2),(7,2)"),
            ("x=1,y=2", "(1,2)"), ("x=1,y=2", "1,2"), ("x=1,y=2", "y=2,x=1"), ("x=3,x=-2", "-2,3"),
            ("-2<x<1, 3<x<5", "(3,5), (-2,1)"),
        ],
        [
            ("(1,2)", "[1,2]"), ("(1,2)", "(2,1)"), ("5", r"5 \text{ or } 7"),
            ("3", r"3\text{ cm or }4\text{ cm}"), ("7", r"7\text{ m and }4\text{ cm}"), ("7", r"7\text{ m and}"),
            ("5", r"\pm 5"), ("1,2", "1,2,3"),
            ("[0,1)", "[0,1]"), ("[0,1)", "0,1"), ("(0,1]", "0,1"), ("[0,1]", "0,1"),
            ("x=1,y=2", "2,1"), ("x=1,y=2", "(2,1)"), ("x=1,y=2", r"\{2,1\}"), ("x=1,y=2", "[1,2)"),
            ("[0,1)", "x=0, x=1"), (r"(3,\frac{\pi}{2})", r"\emptyset"), ("(2,2)", r"\{\}"), ("(3,2)", "3 = 2"),
            (r"\mathbb{Z}", r"\mathbb{Z}_{>0}"), (r"x \in \mathbb{R}", r"x \in \mathbb{R}_+"),
        ],
    ),
    "texts": (
        [
            (r"\text{Evelyn}", "Evelyn"), (r"\text{(C)}", "C"), ("C", r"\textbf{(C)}"), ("C", "C."), ("C", "c"),
            (r"\text{even}", r"\text{Even.}"), (r"\text{A, C}", "A, C"), ("MR=SRMC", "SRMC = MR"),
            (r"\{x \mid x>0\}", r"\left\{ x \mid x > 0 \right\}"), (r"\text{June 20}", "june 20"),
            (r"\text{Yes}", "yes"), ("Yes", r"\text{yes}"), ("No", "no"), (r"\text{(F)}", "F"), (r"\text{SAS}", "SAS"),
            (r"\text{Ann}", "Ann"), ("odd", r"\text{Odd}"), ("C", r"\text{(c)}"), ("e", r"\text{e}"),
        ],
        [
            (r"\text{east}", "seat"), ("10", r"\text{ten}"), ("C", "D"),
            ("Rr", "rr"), ("mM", "mm"), ("V", "v"), ("(a,B)", "(A,b)"), (r"\text{odd}", "even"),
            (r"M\text{ kg}", r"m\text{ kg}"),
            (r"\text{odd}", "1"), ("e", "E"), ("e", r"\text{(E)}"), ("e", r"\text{E}"), ("b", "(B)"), ("a, c", "A, C"),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_equal(kind: str) -> None:
    assert [pair for pair in KINDS[kind][0] if not are_equal(*pair)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_not_equal(kind: str) -> None:
    assert [pair for pair in KINDS[kind][1] if are_equal(*pair)] == []


@pytest.mark.parametrize(
    "text",
    [
        "", "((((", "5 +", "(5", "5]", "5,,6", "1 2", r"\neq 5", "> 5", r"41 \implies 42", "41 | 42",
        r"1, 2, \ldots, 10", "0.333...", r"\int_0^1 x dx", r"\{x \mid x > 0\}", r"5 \pmod 7", r"\text{at least } 5",
        "1 to 3", "approximately 5", "12_2x5", "5!!", "x5", r"\begin{cases} 1 & x > 0 \\ 2 & x < 0 \end{cases}",
        r"5 \unknown", "f(1, 2", r"\frac{1}{0}", "#5", "5 & 6", r"1 \text{ hour } 20",
        "5 factorial", "5 below zero", "5 negative", r"5\text{ per thousand}", "1 hundred twenty",
        r"1\text{ hundred twenty-five}", r"5\text{ two-thirds}", r"5\text{ fifteenths}", r"5\text{ half-lives}",
        r"5\text{ hundred thousandths}", r"5\,\frac{\text{million}}{\text{year}}", r"5/\text{million}",
    ],
)  # fmt: skip
def test_a_text_of_which_a_part_is_not_understood_is_not_read(text: str) -> None:
    assert not read(text).readable


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.10", sympy.Rational(11, 10)), (r"2\frac13\pi", sympy.Rational(7, 3) * sympy.pi),
        ("2e - 1", 2 * sympy.E - 1), (r"\sqrt[3]{-8}", -2), (r"\sum_{i=1}^{10} i", 55),
        (r"\sum_{i=1}^{3} i + 2i", 6 + 2 * sympy.I),
        (r"\sin^{-1}(1)", sympy.pi / 2), (r"|{-2}|", 2), ("x^10", sympy.Symbol("x") ** 10),
    ],
)  # fmt: skip
def test_values(text: str, value: sympy.Expr) -> None:
    (reading,) = read(text).readings
    assert reading == value


GOLDS = (
    r"\left( 3, \frac{\pi}{2} \right)", r"\frac{270}7\text{ degrees}", r"10,\!080", r"864 \mbox{ inches}^2",
    r"5.4 \text{ cents}", "4210_{5}", r"x \in [-2,7]", r"\left(\frac{3}{5},\frac{8}{3}\right]", r"\{1\pm\sqrt{5},-2\}",
    r"\frac{dx}{dt} = kx - a", r"0.003^{\prime \prime}",
    r"\frac{2 \pi c^{2} R^{2}}{d^{2} \lambda^{5} \left(e^{\frac{hc}{\lambda k T}} - 1\right)}",
    r"m \frac{d v}{d t}+b v=f", "7.6Z", r"x_{0} \cos (\omega t)+\frac{\dot{x}_{0}}{\omega} \sin (\omega t)",
    r"15000 \text{ kcal m}^{-2} \text{yr}^{-1}", "E_{1},E_{2}",
    r"\frac{dM}{dt}=\frac{10^{5} L_{\odot}}{0.007 c^{2} M_{\odot}^{6}} M^{6}", r"y^{\prime}+ry-rx(t)=0",
    r"I(0)e^{-\frac{t}{RC}}",
)  # fmt: skip


@pytest.mark.parametrize("gold", GOLDS)
def test_golds_of_the_test_sets_are_read_and_equal_themselves_alone(gold: str) -> None:
    assert read(gold).readable
    assert are_equal(gold, rf"\[ {gold} \]".replace(r"\frac", r"\dfrac"))
    for other in ("0", "1", "x", r"\emptyset", "3 = 2", "1 = 1", "0:0", r"\infty", *GOLDS):
        assert other == gold or not are_equal(gold, other), other
