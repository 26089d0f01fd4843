"""Which language a text is in, by the small words it cannot do without.

Good enough to see that an answer has left its text's language; silent where it cannot tell. Other
scripts than Latin and Cyrillic are told apart by their script alone.
"""

# ruff: noqa: RUF001
from __future__ import annotations

import re
from collections import Counter

_SMALL_WORDS = {
    "English": "the of and to is that it was for are with his they this have from by not but what "
    "were when your which their will would there been who if do she you we he",
    "Spanish": "el los las del que una por con para es se lo como más pero sus este esta son fue "
    "muy todo cuando hay desde nos también hasta ser y",
    "French": "le les des une est pas pour que qui dans sur avec ce il elle sont nous vous au aux "
    "mais ou plus cette être fait ont leur et du",
    "German": "der die das und ist nicht ein eine zu den von mit sich des auf für im dem auch als "
    "wie wird bei sind oder nach ich wir aber hat",
    "Italian": "il gli della che non una per con sono è alla nel dei più anche come questo ha del "
    "le degli delle si ma era nella",
    "Portuguese": "os uma que não para com por mais dos como mas foi ele das tem seu sua ou ser "
    "quando muito há nos já está também pelo e é em da do na no ao",
    "Dutch": "het een van en dat die niet zijn op te met voor aan er maar om hem dan ook naar bij "
    "ze dit uit worden was wordt ik wij",
    "Swedish": "och att det som en är av för på med den till inte har om ett men var så från vi "
    "kan när nu eller han hon sig",
    "Polish": "nie się że jest na do jak ale po co tak za od przez być tym już tylko był jego oraz "
    "może dla są które w z",
    "Turkish": "ve bir bu için ile da de çok daha olan gibi olarak ama ne var en kadar sonra her "
    "değil ise ben sen",
    "Indonesian": "yang dan di itu dengan untuk tidak ini dari dalam akan pada juga saya ke karena "
    "ada mereka oleh adalah bisa atau",
    "Russian": "и в не на что он с как это по но они мы из у за то все так его её было был от же "
    "для я вы",
    "Ukrainian": "і в не на що він з як це по але вони ми із у за то все так його її було був від "
    "для я ви та є",
    "Bulgarian": "и в не на че той с как това по но те ние от за са е да се ще беше който като при",
}  # fmt: skip
_LANGUAGES_OF: dict[str, list[str]] = {}
for _language, _words in _SMALL_WORDS.items():
    for _word in _words.split():
        _LANGUAGES_OF.setdefault(_word, []).append(_language)

_LEAST_SHARE = 0.12
_LEAST_LEAD = 1.5
_FEWEST_WORDS = 6


def guess_language(text: str) -> str | None:
    """The language's English name, or None where the text is too short or nothing stands out."""
    words = re.findall(r"[^\W\d_]+", text[:4000].lower())
    if len(words) < _FEWEST_WORDS:
        return None
    votes = Counter(language for word in words for language in _LANGUAGES_OF.get(word, ()))
    (first, most), (_, second) = [*votes.most_common(2), ("", 0), ("", 0)][:2]
    enough = most >= _LEAST_SHARE * len(words) and most >= _LEAST_LEAD * second
    return first if enough else None


def is_other_language(text: str, answer: str) -> bool:
    """Whether both have a language and it is not the same."""
    before, after = guess_language(text), guess_language(answer)
    return before is not None and after is not None and before != after
