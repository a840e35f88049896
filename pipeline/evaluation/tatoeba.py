"""Sentence pairs in the Tatoeba layout of LASER and XTREME: `tatoeba.xxx-eng.xxx` next to `tatoeba.xxx-eng.eng`.

In: a directory. Out: language -> the two files, and their pairs: line n of one file is the translation of line n of the
other. Languages have the codes that the rest of the project uses (`deu` is `de`).
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.errors import UserError

_LAYOUT = re.compile(r"tatoeba\.(?P<code>\w+)-eng\.(?P=code)")
# ISO 639-3 code -> shorter code. Languages without one keep their three letters.
SHORT_CODES = dict(
    word.split("=")
    for word in """afr=af amh=am ara=ar aze=az bel=be ben=bn bos=bs bre=br bul=bg cat=ca ces=cs cmn=zh-Hans cym=cy dan=da
    deu=de ell=el epo=eo est=et eus=eu fao=fo fin=fi fra=fr fry=fy gla=gd gle=ga glg=gl heb=he hin=hi hrv=hr hun=hu hye=hy
    ido=io ile=ie ina=ia ind=id isl=is ita=it jav=jv jpn=ja kat=ka kaz=kk khm=km kor=ko kur=ku lat=la lit=lt lvs=lv mal=ml
    mar=mr mkd=mk mon=mn nld=nl nno=nn nob=no oci=oc pes=fa pol=pl por=pt ron=ro rus=ru slk=sk slv=sl spa=es sqi=sq srp=sr
    swe=sv swh=sw tam=ta tat=tt tel=te tgl=tl tha=th tuk=tk tur=tr uig=ug ukr=uk urd=ur uzb=uz vie=vi xho=xh yid=yi
    zsm=ms""".split()
)


def tatoeba_files(directory: Path) -> dict[str, tuple[Path, Path]]:
    """Language -> (English file, file of the other language). A file without its partner raises a `UserError`."""
    files = {}
    for path in sorted(directory.glob("tatoeba.*")):
        match = _LAYOUT.fullmatch(path.name)
        if match is None:
            continue
        english = path.with_suffix(".eng")
        if not english.is_file():
            raise UserError(f"{path} has no English file: {english.name} is missing. Put it into the same directory.")
        files[SHORT_CODES.get(match["code"], match["code"])] = (english, path)
    return files


def read_line_pairs(english: Path, other: Path, max_pairs: int) -> list[tuple[str, str]]:
    """(English, other) of the first `max_pairs` lines of two parallel files."""
    columns = [_lines(path) for path in (english, other)]
    if len(columns[0]) != len(columns[1]):
        first_alone = min(map(len, columns)) + 1
        raise UserError(
            f"{english} has {len(columns[0])} lines, {other} has {len(columns[1])}: line {first_alone} has no partner. Use "
            "files of the same release."
        )
    for path, lines in zip((english, other), columns, strict=True):
        for number, line in enumerate(lines[:max_pairs], start=1):
            if not line:
                raise UserError(f"{path}, line {number}, is empty. Delete that line from both files.")
    return list(zip(*(lines[:max_pairs] for lines in columns), strict=True))


def _lines(path: Path) -> list[str]:
    text = read_text(path)
    return [line.strip() for line in text.removesuffix("\n").split("\n")] if text else []


def read_text(path: Path) -> str:
    """The text of a file without a byte order mark. Raises `UserError` where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}). Convert it first.") from None
