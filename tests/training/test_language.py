# ruff: noqa: RUF001
import pytest

from pipelines.training.rewriting import guess_language, is_other_language

TEXTS = {
    "en": "The keeper saved two penalties and the home side won the league on Friday.",
    "es": "El portero paró dos penaltis y el equipo local ganó la liga con todo.",
    "fr": "Le gardien a arrêté deux tirs et les joueurs ont gagné dans le stade.",
    "de": "Der Torwart hielt zwei Elfmeter und die Mannschaft gewann das Spiel auf dem Platz.",
    "it": "Il portiere ha parato due rigori e la squadra ha vinto nel finale.",
    "pt": "O goleiro defendeu dois pênaltis e o time da casa não perdeu em uma partida.",
    "nl": "De keeper stopte twee strafschoppen en het team van de trainer won op het veld.",
    "sv": "Målvakten räddade två straffar och det är en seger som vi inte har sett på länge.",
    "pl": "Bramkarz obronił dwa rzuty karne i nie jest to jedyny mecz, który wygrał w lidze.",
    "ru": "Вратарь отбил два пенальти, и это не все, что он сделал в игре за команду.",
    "uk": "Воротар відбив два пенальті, і це не все, що він зробив у грі за команду.",
}


@pytest.mark.parametrize("language", TEXTS)
def test_ordinary_sentences_have_their_language(language):
    assert guess_language(TEXTS[language]) == language


@pytest.mark.parametrize(
    "text", ["", "OK", "😀😀", "Rain.", "qty 4 sku 8811 xl red", "def f(x): return x + 1"]
)
def test_texts_of_no_certain_language_have_none(text):
    assert guess_language(text) is None


def test_only_two_known_languages_can_differ():
    assert is_other_language(TEXTS["en"], TEXTS["es"])
    assert not is_other_language(TEXTS["en"], TEXTS["en"].upper())
    assert not is_other_language("qty 4 sku 8811", TEXTS["es"])
