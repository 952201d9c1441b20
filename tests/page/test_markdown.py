"""The Markdown renderer by itself: what it makes, that growing text ends the same, and its speed."""

import pytest

pytestmark = pytest.mark.page

RENDER = """async (text) => {
    const {MarkdownView} = await import('./markdown.js');
    const root = document.createElement('div');
    new MarkdownView(root).update(text);
    return root.innerHTML;
}"""


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("a *b* **c** ***d*** ~~e~~ `f`", "<p>a <em>b</em> <strong>c</strong> <strong><em>d</em></strong> <del>e</del> <code>f</code></p>"),
        ("snake_case_name and _word_", "<p>snake_case_name and <em>word</em></p>"),
        ("2 * 3 * 4 and a ** b", "<p>2 * 3 * 4 and a ** b</p>"),
        (r"\*not\* and \` too", "<p>*not* and ` too</p>"),
        ("``a ` b``", "<p><code>a ` b</code></p>"),
        ("`**not bold**`", "<p><code>**not bold**</code></p>"),
        ("unclosed **bold and `code", "<p>unclosed **bold and `code</p>"),
        ("a  \nb\nc", "<p>a  <br>b\nc</p>"),
        ("# A\n## B ##\ntext", '<h3 class="level1">A</h3><h4 class="level2">B</h4><p>text</p>'),
        ("- a\n- b\n  - c\n\ntext", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><p>text</p>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
        ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
        ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
        ("&lt;b&gt; &amp; &copy;", "<p>&lt;b&gt; &amp; &amp;copy;</p>"),
        ("in 1986.\n1986 was", "<p>in 1986.\n1986 was</p>"),
        ("a | b\nno table", "<p>a | b\nno table</p>"),
    ],
)  # fmt: skip
def test_what_is_made(page, text, made):
    assert page.evaluate(RENDER, text) == made


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("[a](https://x.org/b_(c) \"t\")", "https://x.org/b_(c)"),
        ("see https://x.org/a?b=c&d, and", "https://x.org/a?b=c&d"),
        ("<http://x.org>", "http://x.org/"),
        ("[a](JAVASCRIPT:alert(1))", None),
        ("[a](//x.org)", None),
        ("[a](/local)", None),
        ("[a](vbscript:x)", None),
        ("![a](https://x.org/p.png)", None),
    ],
)  # fmt: skip
def test_only_web_addresses_are_links(page, text, address):
    found = page.evaluate(
        """async (text) => {
            const {MarkdownView} = await import('./markdown.js');
            const root = document.createElement('div');
            new MarkdownView(root).update(text);
            return [...root.querySelectorAll('a, [href], [src]')].map((node) => [node.href, node.rel]);
        }""",
        text,
    )
    assert found == ([[address, "noopener noreferrer nofollow"]] if address else [])


def test_text_that_grows_ends_as_if_it_had_come_at_once(page):
    from fake_server import HOSTILE, MARKDOWN

    nested = (
        "1. a\n\n   ```py\n   x = 1\n   ```\n\n   b\n2. c\n   > d\n\n***\n| a |\n|---|\n| b |\nend"
    )
    for text in (MARKDOWN, HOSTILE, nested):
        grown = page.evaluate(
            """async (text) => {
                const {MarkdownView} = await import('./markdown.js');
                const root = document.createElement('div');
                const view = new MarkdownView(root);
                for (let i = 1; i <= text.length; i++) view.update(text.slice(0, i));
                return root.innerHTML;
            }""",
            text,
        )
        assert grown == page.evaluate(RENDER, text)


def test_each_text_node_knows_its_place_in_the_source(page):
    from fake_server import HOSTILE, MARKDOWN

    for text in (MARKDOWN, HOSTILE):
        wrong = page.evaluate(
            """async (text) => {
                const {MarkdownView} = await import('./markdown.js');
                const {origins} = await import('./inline.js');
                const root = document.createElement('div');
                new MarkdownView(root).update(text);
                const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
                const wrong = [];
                while (walker.nextNode()) {
                    const {data} = walker.currentNode;
                    const at = origins.get(walker.currentNode);
                    if (at !== undefined && text.slice(at, at + data.length) !== data) wrong.push([at, data]);
                }
                return wrong;
            }""",
            text,
        )
        assert wrong == []


@pytest.mark.parametrize(
    "piece",
    [
        "**a ",
        "[",
        "`",
        "> ",
        "- ",
        "*_",
        "a|",
        "((",
        "<http://",
        "![](",
        "\\",
        "~~",
        "1. ",
        "&",
        "_a_b",
    ],
)
def test_no_text_takes_long(page, piece):
    for text in (piece * 4000, (piece + "\n") * 2000):
        took = page.evaluate(
            """async (text) => {
                const {MarkdownView} = await import('./markdown.js');
                const began = performance.now();
                new MarkdownView(document.createElement('div')).update(text);
                return performance.now() - began;
            }""",
            text,
        )
        assert took < 1500, f"{took:.0f} ms"


def test_code_colours_keep_the_text(page):
    code = "def f(x):\n    '''doc\n    more'''\n    return \"a\\\"b\" + 0x1F  # end\n"
    for language in ("python", "js", "c", "rust", "sh", "sql", "json", "css", "html", "none"):
        parts = page.evaluate(
            "async ([code, language]) => (await import('./highlight.js')).highlight(code, language)",
            [code, language],
        )
        assert "".join(text for _, text in parts) == code
    kinds = dict((text, kind) for kind, text in parts) if language == "python" else {}
    assert kinds == {} or kinds["def"] == "keyword"
