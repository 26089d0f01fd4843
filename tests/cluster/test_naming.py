"""What a namer is shown of a cluster."""

from cluster.describe import Description, Example
from cluster.outcome import brief_of


def example(text):
    return Example("id", 0.1, text, None)


def test_a_brief_holds_the_beginnings_of_different_documents():
    cluster = Description(
        0,
        9,
        1.0,
        ["orbit"],
        [example("same  text"), example("same text"), example(None), example("left out")],
        [example("same text"), example("x" * 5_000), example(""), example("last")],
        0.5,
        None,
        None,
    )
    brief = brief_of(cluster)
    assert brief.keywords == ["orbit"]
    assert brief.texts == ["same text", "x" * 300, "last"]
