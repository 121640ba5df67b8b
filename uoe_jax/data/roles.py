"""Which columns of a table are the row, the column and the value.

By names that are known, in the languages that tables of ratings are written in; by
order where they aren't, unless what the columns hold speaks against it.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from uoe_jax.data.columns import Columns
from uoe_jax.data.delimited import is_number
from uoe_jax.errors import ConfigError, DataError, nearest

# Names by which columns are known: without case, accents, signs, a last s and what
# follows a colon. English, then German, French, Spanish, Portuguese, Italian, Dutch,
# Polish, Russian, Turkish, Chinese, Japanese and Korean. The first in the list that a
# table has counts.
KNOWN = (
    "row user userid uid u customer customerid custid client clientid member memberid "
    "reviewer reviewerid account accountid visitor visitorid person personid "
    "nutzer nutzerid benutzer kunde kundenid utilisateur usuario cliente utilizador "
    "utente gebruiker klant użytkownik klient пользователь клиент kullanıcı müşteri "
    "用户 用户id 客户 ユーザー ユーザーid ユーザ 顧客 사용자 고객",
    "col column item itemid iid i movie movieid film filmid book bookid isbn product "
    "productid asin parentasin business businessid song songid track trackid artist "
    "artistid game gameid anime animeid recipe recipeid joke jokeid course courseid "
    "restaurant restaurantid artikel artikelid produkt buch article produit livre "
    "artículo producto película libro produto filme livro articolo prodotto boek "
    "książka товар фильм книга продукт ürün kitap 物品 商品 电影 产品 图书 "
    "アイテム 映画 製品 상품 영화 아이템",
    "value val rating rate score r data overall bookrating y stars starrating "
    "userrating reviewscore bewertung wertung sterne wert note évaluation valeur "
    "étoiles puntuación calificación valoración valor estrellas avaliação "
    "classificação pontuação nota voto valutazione punteggio valore "
    "beoordeling waardering cijfer ocena оценка рейтинг puan 评分 分数 得分 "
    "評価 評点 得点 평점 점수",
)
FEW = 11  # distinct ratings at most: 0 to 10


def _plain(name: str) -> str:
    """Return a name as it is compared: letters without accents, and digits."""
    apart = unicodedata.normalize("NFKD", name.split(":")[0].strip().lower())
    letters = "".join(c for c in apart if c.isalnum() and not unicodedata.combining(c))
    return letters.removesuffix("s")


def _known(names: Sequence[str], role: int) -> int | None:
    """Return the position of the best-known name of a role, 0 to 2."""
    plain = [_plain(name) for name in names]
    known = map(_plain, KNOWN[role].split())
    return next((plain.index(name) for name in known if name in plain), None)


def are_names(names: list[str]) -> bool:
    """Whether a line names a row, a column and a value."""
    return None not in [_known(names, role) for role in range(3)]


def pick_columns(
    path: Path, found: Columns, asked: str | Sequence[str] | None, need: int
) -> list[int]:
    """Return the positions of row, column and, of three, value."""
    names, width = found.names, len(found.names)
    if asked is not None:
        return _asked(path, found, asked, need)
    roles = "a row, a column and a value" if need == 3 else "a row and a column"
    if width == 1 and found.sample:  # a text that no delimiter splits
        raise DataError(
            f"{path} has one column, {names[0]!r}; it needs {roles}: say what stands "
            "between them with --delimiter"
        )
    if width < need:
        raise DataError(
            f"{path} has {'columns' if found.named else 'only columns'} {names}; it "
            f"needs {roles}"
            + (
                ": events without a value (implicit feedback) aren't supported"
                * (need == 3)
            )
        )
    choose = DataError(
        f"{path} has columns {names}; say which are {roles.replace('a ', '')}: "
        + ("--columns user,item,rating, by name or by number from 1")
    )
    columns = [list(column) for column in zip(*found.sample, strict=False)]
    unknown = not found.named or _known(names, 2) is None
    if need == 3 and unknown and columns and _begins_with_ratings(columns):
        raise choose
    if not found.named:
        if need == 3 and width > 3 and columns and not _is_rating(columns):
            raise choose
        return list(range(need))
    known = [_known(names, role) for role in range(need)]
    rest = [place for place in range(width) if place not in known]
    in_place = all(place in (None, role) for role, place in enumerate(known))
    # Three are taken in order; of more, a guess would take a time for a value. Where
    # the value is known, which of the others is called a row makes no difference.
    sure = known[-1] is not None or known.count(None) == 1 or in_place
    if None in known and (width > need and not (need == 2 and in_place) or not sure):
        raise choose
    chosen = [rest.pop(0) if place is None else place for place in known]
    for place in chosen:
        _check_single(path, names, names[place])
    return chosen


def _check_single(path: Path, names: Sequence[str], name: str) -> None:
    """Raise DataError for a name that several columns have."""
    plain = name.strip().lower()
    places = [i for i, other in enumerate(names, 1) if other.strip().lower() == plain]
    if len(places) > 1:
        raise DataError(
            f"{path} has {len(places)} columns called {name!r}, "
            f"{' and '.join(map(str, places))}; say which are row, column and value by "
            "number: --columns 1,2,3"
        )


def _is_rating(columns: list[list[str]]) -> bool:
    """Whether the third of more columns without names is likely the value.

    It is if it holds numbers and none of the three are times, unless a later one has
    fractions and it has none.
    """
    first, second, third, *later = columns
    if _are_times(first) or _are_times(second) or not _are_small(third):
        return False
    fractions = [_are_small(c) and _have_fractions(c) for c in later]
    return _have_fractions(third) or not any(fractions)


def _begins_with_ratings(columns: list[list[str]]) -> bool:
    """Whether the first or second column looks like ratings, and the third like ids.

    A few small numbers there, and many whole numbers, some of them larger, here.
    """
    third, most = columns[2], len(set(columns[2])) / 2
    whole = all(re.fullmatch(r"\s*\d{1,15}\s*", field) for field in third)
    if len(third) < 20 or not whole or max(map(int, third)) < FEW:
        return False
    return any(
        len(set(column)) <= min(FEW, most)
        and all(map(is_number, column))
        and all(abs(float(field.replace(",", "."))) < FEW for field in column)
        for column in columns[:2]
    )


def _are_times(fields: list[str]) -> bool:
    """Whether fields are dates, or seconds since 1970 of the years 1989 to 2039."""
    date = re.compile(r"\s*(\d{4}-\d\d-\d\d|\d\d?[./]\d\d?[./]\d{4})")
    seconds = re.compile(r"\s*([6-9]|1\d|2[01])\d{8}(\.\d*)?\s*$")
    return any(all(map(kind.match, fields)) for kind in (date, seconds))


def _are_small(fields: list[str]) -> bool:
    filled = [field for field in fields if field.strip()]
    return all(map(is_number, filled)) and not all(
        float(field.replace(",", ".")) > 1e8 for field in filled
    )


def _have_fractions(fields: list[str]) -> bool:
    return any(float(f.replace(",", ".")) % 1 for f in fields if f.strip())


def _asked(
    path: Path, found: Columns, asked: str | Sequence[str], need: int
) -> list[int]:
    try:
        listed = next(csv.reader([asked]), []) if isinstance(asked, str) else [*asked]
    except csv.Error:  # a line break outside quotes
        raise ConfigError(
            f"columns is {asked!r}, more than a line; give three with commas between: "
            "--columns user,item,rating"
        ) from None
    wanted = [str(name).strip() for name in listed]
    if len(wanted) not in (3, need):
        raise ConfigError(
            f"columns is {','.join(wanted)!r}; give three, row, column and value: "
            "--columns user,item,rating"
        )
    places, width = [], len(found.names)
    for name in wanted[:need]:
        if name in found.names:
            _check_single(path, found.names, name)
            places.append(found.names.index(name))
        elif name.isdecimal() and 1 <= int(name) <= width:
            places.append(int(name) - 1)
        elif name.lstrip("-").isdecimal():
            raise DataError(
                f"{path} has no column {name}; columns are counted from 1 to {width}"
            )
        else:
            raise DataError(
                f"{path} has no column {name!r}; {nearest(name, found.names)}"
            )
    if len(set(places)) < need:
        raise ConfigError(
            f"columns is {','.join(wanted)!r}, one of them twice; give different ones"
        )
    return places
