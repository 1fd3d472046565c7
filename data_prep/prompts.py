"""Many natural-language prompts per task, chosen by the hash of the sample's id.

A model that has seen one wording per task answers that wording only (the Qwen3-Omni report, section 3, asks for many).
The choice depends on the id alone, so that a data set has the same prompts each time it is made.
"""

from __future__ import annotations

from collections.abc import Mapping

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
        "Write the words of this {input} recording.",
        "This is {input}. What is being said?",
        "Turn the speech into text.",
        "Take this down, word for word.",
        "Please transcribe this audio in {input}.",
        "What are the exact words?",
        "Listen and write down every word.",
        "Give me the text of this {input} audio.",
        "Someone speaks {input}; write what they say.",
        "Speech to text, {input}:",
    ),
    "s2tt": (
        "Translate the speech into {language}.",
        "What is said here? Answer in {language}.",
        "Listen and write it in {language}.",
        "{language} translation of this recording:",
        "Put what you hear into {language}.",
        "Translate the {input} speech into {language}.",
        "Someone speaks {input}. What do they say, in {language}?",
        "Translate this recording from {input} to {language}.",
        "Write in {language} what the {input} speaker says.",
        "Turn this {input} audio into {language} text.",
        "How would you say this in {language}?",
        "I do not understand {input}. What does this mean in {language}?",
        "From {input} into {language}:",
        "Give the {language} meaning of what is said in {input}.",
        "Interpret this for someone who reads {language}.",
        "Please write a {language} translation of what you hear.",
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
        "What is making this noise? Say it in {language}.",
        "Listen: what is it? {language}.",
        "Describe the sound in {language}.",
        "Give the sound a name in {language}.",
        "What can be heard in this recording? Answer in {language}.",
        "Which animal or thing is that? Write it in {language}.",
        "Where does this sound come from? {language}, please.",
        "Recognise the sound and name it in {language}.",
        "In {language}: what makes this noise?",
        "Label this audio in {language}.",
        "{language} name of what you hear:",
        "Tell me in {language} what this sound is.",
    ),
    "audio_caption": (
        "Describe this recording.",
        "What can be heard?",
        "Write a caption of the sound.",
        "Say in one sentence what you hear.",
        "Caption this audio.",
        "Who or what is heard here?",
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


# Asked in the language of the answer, for what is heard.
NATIVE_PROMPTS: dict[str, dict[str, tuple[str, ...]]] = {
    "asr": {
        "be": ("Запішы, што кажуць.", "Што тут сказана?"),
        "bg": ("Запиши какво се казва.", "Какво казва говорителят?"),
        "ca": ("Escriu el que es diu.", "Què diu la veu?"),
        "cs": ("Přepiš, co se tu říká.", "Co říká mluvčí?", "Napiš, co slyšíš."),
        "da": ("Skriv ned, hvad der bliver sagt.", "Hvad siger stemmen?"),
        "el": ("Γράψε ό,τι λέγεται.", "Τι λέει ο ομιλητής;"),
        "es": ("Escribe lo que se dice.", "¿Qué dice la voz?", "Transcribe esta grabación, por favor."),
        "fr": ("Écris ce qui est dit.", "Que dit la voix ?", "Transcris cet enregistrement, s'il te plaît."),
        "it": ("Scrivi quello che viene detto.", "Che cosa dice la voce?", "Trascrivi questa registrazione."),
        "lt": ("Užrašyk, kas sakoma.", "Ką sako balsas?"),
        "nl": ("Schrijf op wat er wordt gezegd.", "Wat zegt de spreker?", "Typ wat je hoort."),
        "ro": ("Scrie ce se spune.", "Ce spune vocea?"),
        "ru": ("Запиши, что здесь говорят.", "Что говорит диктор?", "Расшифруй эту запись."),
    },
    "s2tt": {
        "bg": ("Преведи на български това, което чуваш.",),
        "ca": ("Tradueix al català el que sents.",),
        "cs": ("Přelož do češtiny, co slyšíš.", "Co to znamená česky?"),
        "de": ("Übersetze das Gesagte ins Deutsche.", "Was wird hier gesagt? Antworte auf Deutsch."),
        "el": ("Μετάφρασε στα ελληνικά αυτό που ακούς.",),
        "es": ("Traduce al español lo que oyes.", "¿Qué significa esto en español?"),
        "fr": ("Traduis en français ce que tu entends.", "Qu'est-ce que cela veut dire en français ?"),
        "it": ("Traduci in italiano quello che senti.", "Che cosa significa in italiano?"),
        "ja": ("聞こえたことを日本語に訳してください。",),
        "nl": ("Vertaal wat je hoort naar het Nederlands.", "Wat betekent dit in het Nederlands?"),
        "pl": ("Przetłumacz na polski to, co słyszysz.", "Co to znaczy po polsku?"),
        "pt": ("Traduz para português o que ouves.",),
        "ro": ("Tradu în română ce auzi.",),
        "ru": ("Переведи услышанное на русский.", "Что это значит по-русски?"),
        "sl": ("Prevedi v slovenščino, kar slišiš.",),
        "sv": ("Översätt det du hör till svenska.", "Vad betyder det på svenska?"),
        "uk": ("Переклади українською те, що чуєш.",),
        "zh": ("把你听到的翻译成中文。",),
    },
    "sound": {
        "ca": ("Què fa aquest soroll?",),
        "de": ("Was macht dieses Geräusch?", "Was ist hier zu hören?"),
        "el": ("Τι κάνει αυτόν τον ήχο;",),
        "es": ("¿Qué hace este sonido?", "¿Qué se oye?"),
        "fr": ("Qu'est-ce qui fait ce bruit ?", "Qu'entend-on ?"),
        "it": ("Che cosa fa questo rumore?",),
        "ja": ("これは何の音ですか。",),
        "pt": ("O que faz este som?",),
        "ro": ("Ce face acest sunet?",),
        "ru": ("Что издаёт этот звук?",),
        "uk": ("Що видає цей звук?",),
        "zh": ("这是什么声音？",),
    },
}  # fmt: skip

FEW = {"asr": 6, "s2tt": 5, "sound": 4}
"""How many wordings of these tasks the embedded pack has, the first ones: its model is small, its training short."""


def prompt(
    task: str,
    sample_id: str,
    *,
    language: str = "",
    given: str = "",
    text: str = "",
    few: Mapping[str, int] | None = None,
) -> str:
    """The wording of `task` for this sample: one of `PROMPTS`, or of `NATIVE_PROMPTS` in the language of the answer.

    Args:
        few: for each of these tasks, only so many wordings, the first of `PROMPTS`.
        language, given: BCP 47 codes of the answer's and the input's language.
        text: the text to work on, for the tasks whose input is text.

    Raises:
        KeyError: an unknown task, or a language without a name in `LANGUAGE_NAMES`.
    """
    choices = PROMPTS[task] + NATIVE_PROMPTS.get(task, {}).get(language, ())
    if few is not None and task in few:
        choices = choices[: few[task]]
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
