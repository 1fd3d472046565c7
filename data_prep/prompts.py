"""Many natural-language prompts per task, chosen by the hash of the sample's id.

A model that has seen one wording per task answers that wording only (the Qwen3-Omni report, section 3, asks for many).
The choice depends on the id alone, so that a data set has the same prompts each time it is made.
"""

from __future__ import annotations

from data_prep.splits import fraction
from omnitrain.data.sample import Message, Segment

_NAMES = """
    ach=Acoli; af=Afrikaans; ak=Akan; am=Amharic; an=Aragonese; ar=Arabic; as=Assamese; ast=Asturian;
    az=Azerbaijani; be=Belarusian; bg=Bulgarian; bn=Bangla; br=Breton; bs=Bosnian; ca=Catalan;
    ca-valencia=Valencian; ccp=Chakma; ceb=Cebuano; chr=Cherokee; ckb=Central Kurdish; cs=Czech; cy=Welsh;
    da=Danish; de=German; doi=Dogri; dsb=Lower Sorbian; el=Greek; en=English; eo=Esperanto; es=Spanish;
    et=Estonian; eu=Basque; fa=Persian; ff=Fulah; fi=Finnish; fil=Filipino; fo=Faroese; fr=French; ga=Irish;
    gd=Scottish Gaelic; gl=Galician; gu=Gujarati; ha=Hausa; he=Hebrew; hi=Hindi; hr=Croatian; hsb=Upper Sorbian;
    hu=Hungarian; hy=Armenian; ia=Interlingua; id=Indonesian; ig=Igbo; is=Icelandic; it=Italian; iu=Inuktitut;
    ja=Japanese; jv=Javanese; ka=Georgian; kab=Kabyle; kk=Kazakh; kl=Kalaallisut; km=Khmer; kn=Kannada; ko=Korean;
    kok=Konkani; ku=Kurdish; ky=Kyrgyz; la=Latin; lb=Luxembourgish; lo=Lao; lt=Lithuanian; lv=Latvian;
    mai=Maithili; mi=Māori; mk=Macedonian; ml=Malayalam; mn=Mongolian; mni=Manipuri; mr=Marathi; ms=Malay;
    mt=Maltese; my=Burmese; nb=Norwegian Bokmål; ne=Nepali; nl=Dutch; nn=Norwegian Nynorsk; no=Norwegian;
    nso=Northern Sotho; oc=Occitan; or=Odia; pa=Punjabi; pa-Arab=Punjabi in Arabic script; pcm=Nigerian Pidgin;
    pl=Polish; ps=Pashto; pt=Portuguese; pt-BR=Brazilian Portuguese; qu=Quechua; rm=Romansh; ro=Romanian;
    ru=Russian; rw=Kinyarwanda; sa=Sanskrit; sat=Santali; sc=Sardinian; sd=Sindhi; shs=Shuswap; si=Sinhala;
    sk=Slovak; sl=Slovenian; so=Somali; son=Songhay; sq=Albanian; sr=Serbian; sr-Latn=Serbian in Latin script;
    su=Sundanese; sv=Swedish; sw=Swahili; ta=Tamil; te=Telugu; tg=Tajik; th=Thai; ti=Tigrinya; tk=Turkmen;
    to=Tongan; tr=Turkish; tt=Tatar; ug=Uyghur; uk=Ukrainian; ur=Urdu; uz=Uzbek; vec=Venetian; vi=Vietnamese;
    wo=Wolof; xh=Xhosa; yo=Yoruba; yue=Cantonese; yue-Hans=Cantonese in simplified characters; zh=Chinese;
    zh-Hant=Traditional Chinese; zu=Zulu
"""
LANGUAGE_NAMES: dict[str, str] = {
    code: name for code, _, name in (entry.strip().partition("=") for entry in " ".join(_NAMES.split()).split(";"))
}
"""English names of languages by BCP 47 code."""

# {language} is the language of the answer, {input} that of the input.
PROMPTS: dict[str, tuple[str, ...]] = {
    "caption": (
        "Describe the picture in {language}.",
        "What is in this picture? Answer in {language}.",
        "Caption in {language}:",
        "Name what you see, in {language}.",
        "Write a caption in {language}.",
        "What does the image show? {language}, please.",
        "{language} caption of this image?",
    ),
    "keywords": (
        "List keywords for this picture in {language}.",
        "Which words fit this picture? Answer in {language}.",
        "Tag this image in {language}.",
    ),
    "asr": (
        "Transcribe the {input} speech.",
        "Write down what is said in {input}.",
        "What does the speaker say? Answer in {input}.",
        "{input} transcript:",
        "Transcribe this recording.",
        "Type what you hear, in {input}.",
    ),
    "s2tt": (
        "Translate the speech into {language}.",
        "What is said here? Answer in {language}.",
        "Listen and write it in {language}.",
        "{language} translation of this recording:",
        "Put what you hear into {language}.",
    ),
    "t2tt": (
        "Translate into {language}: {text}",
        "Say this in {language}: {text}",
        "{text} In {language}?",
        "{text} Translate this into {language}.",
        "What is the {language} for this? {text}",
    ),
    "sound": (
        "What makes this sound? Answer in {language}.",
        "Name the source of the sound in {language}.",
        "What do you hear? {language}, please.",
        "Which thing sounds like this? Answer in {language}.",
    ),
    "video": (
        "What happens in this video?",
        "Describe the clip.",
        "Tell what happens, in order.",
        "What do you see and hear?",
        "Describe what happens and when.",
    ),
    "video_action": (
        "How does the object move?",
        "What does it do?",
        "Name the movement.",
        "In which way does it move or change?",
    ),
    "video_object": (
        "What is it that moves?",
        "Which object is moving?",
        "Name the moving object.",
        "What do you see moving?",
    ),
    "video_sound": (
        "What can be heard?",
        "Which sound do you hear?",
        "Describe the sound of the clip.",
    ),
    "language": (
        "Which language is this? {text}",
        "Name the language: {text}",
        "{text} In which language is that written?",
    ),
    "define": (
        'What does "{text}" mean?',
        "Define: {text}",
        'Explain the word "{text}".',
    ),
}  # fmt: skip


def prompt(task: str, sample_id: str, *, language: str = "", given: str = "", text: str = "") -> str:
    """The wording of `task` for this sample.

    Args:
        language, given: BCP 47 codes of the answer's and the input's language.
        text: the text to work on, for the tasks whose input is text.

    Raises:
        KeyError: an unknown task, or a language without a name in `LANGUAGE_NAMES`.
    """
    choices = PROMPTS[task]
    return choices[int(fraction("prompt", sample_id) * len(choices))].format(
        language=LANGUAGE_NAMES[language] if language else "",
        input=LANGUAGE_NAMES[given] if given else "",
        text=text,
    )


def ask(sample_id: str, question: str, answer: str, medium: Segment | None = None) -> tuple[Message, Message]:
    """One turn: the medium before or after the question (by the id's hash), then the answer."""
    asked = Segment(type="text", text=question)
    segments = (asked,) if medium is None else (medium, asked)
    if medium is not None and fraction("order", sample_id) < 0.3:
        segments = (asked, medium)
    return Message(role="user", segments=segments), Message(
        role="assistant", segments=(Segment(type="text", text=answer),)
    )
