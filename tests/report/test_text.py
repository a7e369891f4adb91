"""Hostile tokens come out visible and inert."""

from html.parser import HTMLParser

from interp.report.text import escape_html, escape_latex, visible


def test_spaces_show_and_invisible_characters_are_escaped():
    assert visible(" the") == "·the"
    assert visible("\n\t\x00\x1b") == r"\n\t\x00\x1b"
    assert visible("a\u200bb\u202ec\u00a0d\u2028") == r"a\u200bb\u202ec\xa0d\u2028"
    assert visible("\ud800") == r"\ud800"
    assert visible("café 日本") == "café·日本"


def test_html_of_a_token_opens_no_tag_and_reads_back():
    hostile = '</script><script>x=1</script><!--<img src=x onerror="a">&lt;\''

    class Reader(HTMLParser):
        text, opened = "", 0

        def handle_data(self, data):
            self.text += data

        def handle_starttag(self, tag, attrs):
            self.opened += 1

    reader = Reader(convert_charrefs=True)
    reader.feed(escape_html(hostile))
    reader.close()
    assert (reader.text, reader.opened) == (hostile, 0)
    assert '"' not in escape_html(hostile)
    assert "'" not in escape_html(hostile)


def test_html_keeps_line_breaks_but_no_bidirectional_override():
    assert escape_html("a\nb\u202e") == "a\nb\\u202e"


def test_latex_escapes_every_special_character():
    assert escape_latex("_%&#${}") == r"\_\%\&\#\$\{\}"
    assert escape_latex("\\~^") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}"
    # After \\ LaTeX takes [ for an optional argument and * for a variant, and -- is a ligature.
    assert escape_latex("[CLS]*--") == "{[}CLS]{*}{-}{-}"
    assert escape_latex("a\n\nb") == r"a\textbackslash{}n\textbackslash{}nb"
