"""Chat templates that cannot be used: no Jinja, stepping out of the sandbox, without end, or hiding the answer."""

import random
from typing import NamedTuple

GOOD = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Case(NamedTuple):
    name: str
    template: bytes


SYNTAX = [
    "{% if %}{% endif %}",
    "{{ x",
    "{% for m in messages %}",
    "{% endfor %}",
    "{{ messages[0] }",
    "{% unknown %}",
    "{% for %}{% endfor %}",
    "{{ 'a }}",
    "{% if true %}{% endfor %}",
    "{{ a b }}",
    "{% set x %}",
    "{{ x | nofilter }}",
    "{% if x is notest %}{% endif %}",
    "{{ (1 }}",
    "{{ [1, }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{{ 1 + }}",
    "{% macro %}{% endmacro %}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% extends 'base' %}",
    "{# never closed",
    "{% from 'x' import y %}",
    "{% block a %}{% endblock %}{% block a %}{% endblock %}",
    "{{ x.}}",
    "{{ .x }}",
    "{% break %}",
    "{% raw %}",
    "{% call x %}{% endcall %}",
    "{{ {'a': } }}",
    "{{ 1 if }}",
    "{% filter %}{% endfilter %}",
]

FAILS = [
    "{{ nothing.at.all }}",
    "{{ messages[99].content }}",
    "{{ messages[0].content.x.y }}",
    "{{ 1 / 0 }}",
    "{{ 1 % 0 }}",
    "{{ nothing() }}",
    "{{ messages.nothing() }}",
    "{{ 'a' + 1 }}",
    "{{ messages + 1 }}",
    "{{ raise_exception('no') }}",
    "{{ 'abc'.index('z') }}",
    "{{ '%d' % 'x' }}",
    "{{ messages | sum }}",
    "{{ [1, 'a'] | sort }}",
    "{{ 3 | length }}",
    "{{ strftime_now(3) }}",
    "{{ '{}'.format() }}",
    "{{ '{0.x.y}'.format(1) }}",
    "{{ messages | batch(0) | list }}",
    "{{ range(0, 9, 0) }}",
    "{{ messages | map('nofilter') | list }}",
    "{{ 'a'.encode('nothing') }}",
    "{{ messages[0] | tojson(indent='x') | int('x', 99) }}{{ nothing.x }}",
    "{{ 'x' | xmlattr }}",
    "{{ messages | groupby('role') | first | last | nothing }}",
    "{{ '\\ud800' }}",
    "{{ dict(a=1, **3) }}",
    "{{ messages | selectattr('role', 'nothing') | list }}",
    "{{ cycler() }}",
    "{{ joiner(1, 2, 3) }}",
    "{{ namespace(1, 2) }}",
    "{% set ns = 3 %}{% set ns.x = 1 %}",
    "{{ ''.join([1]) }}",
    "{{ [] | first.x }}",
    "{{ messages | round }}",
    "{{ [1, 2, 3] | slice(0) | list }}",
    "{{ -'a' }}",
    "{{ lipsum(n='x') }}",
]

ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ messages[0]['__class__']['x'] }}",
    "{{ ''['__class__'] }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ lipsum.__globals__['os'].popen('true').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ messages.append({}) }}",
    "{{ messages.pop() }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ messages[0].pop('content') }}",
    "{{ messages.sort() }}",
    "{{ messages | attr('__class__') }}",
    "{{ ('' | attr('__class__')).__mro__ }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages.__getattribute__('append') }}",
    "{{ (messages.__len__).__self__ }}",
    "{{ ''.format_map({}) .__class__ }}",
    "{{ 'x'.__add__('y') }}",
    "{{ messages.__reduce_ex__(2) }}",
    "{% set x = messages.__iter__ %}{{ x() }}",
    "{{ raise_exception.__closure__ }}",
    "{{ messages.extend([1]) }}",
    "{{ messages.insert(0, {}) }}",
    "{{ messages[0].setdefault('x', 1) }}",
    "{{ ''.__doc__ }}",
    "{{ open('/etc/passwd').read() }}",
    "{{ __import__('os') }}",
    "{{ eval('1') }}",
    "{{ messages[0].__setitem__('content', 'x') }}",
]

ENDLESS = [
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{% for i in range(90000) %}{% for j in range(90000) %}x{% endfor %}{% endfor %}",
    "{% for i in range(90000) %}{% for j in range(90000) %}{% if false %}x{% endif %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ 'a' * 10 ** 11 }}",
    "{{ 10 ** 10 ** 8 }}",
    "{{ [0] * 10 ** 11 }}",
    "{{ '' | center(10 ** 12) }}",
    "{{ 2 ** 2 ** 40 }}",
    "{{ 'x' | indent(10 ** 12) }}",
    "{{ '%999999999999d' % 3 }}",
    "{{ '{:999999999999}'.format(3) }}",
    "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{{ 'x'.ljust(10 ** 12) }}",
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9) %}{% endfor %}{% endfor %}{% endfor %}",
    "{{ lipsum(n=10 ** 9) }}",
    "{{ 'x'.zfill(10 ** 12) }}",
    "{{ 'a'.replace('', 'b' * 99999) * 99999 }}",
]

NO_ANSWER = [
    "",
    " ",
    "hello",
    "{{ messages[0].content }}",
    "{% for m in messages %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}",
    "{% generation %}{% endgeneration %}{{ messages | length }}",
    "{{ bos_token }}",
    "{# nothing #}",
    "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}",
    "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}",
    "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.content if not loop.last }}{% endfor %}",
]


def cases(seed: int) -> list[Case]:
    rng = random.Random(seed)
    found = [
        Case(f"{kind} {text[:60]}", text.encode("utf-8", "surrogatepass"))
        for kind, texts in (("syntax", SYNTAX), ("no answer", NO_ANSWER))
        for text in texts
    ]
    # What fails when it runs, fails wherever it stands in a template that is good otherwise.
    for kind, texts in (("fails", FAILS), ("escapes", ESCAPES), ("endless", ENDLESS)):
        for text in texts:
            place = rng.choice(["before", "after", "inside"])
            whole = {"before": text + GOOD, "after": GOOD + text, "inside": GOOD.replace("{{", text + "{{", 1)}[place]
            found.append(Case(f"{kind} {place} {text[:60]}", whole.encode("utf-8", "surrogatepass")))
    found.append(Case("not UTF-8", GOOD.encode() + b"\xff"))
    found.append(Case("a null character", b"\0" + GOOD.encode()[:-2]))
    return found
