"""Names of languages as CC-100 spells them, and the other codes by which data sets of the hub name the same languages."""

from __future__ import annotations

CC100 = frozenset(
    """af am ar as az be bg bn bn_rom br bs ca cs cy da de el en eo es et eu fa ff fi fr fy ga gd gl gn gu ha he hi hi_rom
    hr ht hu hy id ig is it ja jv ka kk km kn ko ku ky la lg li ln lo lt lv mg mk ml mn mr ms my my_zaw ne nl no ns om
    or pa pl ps pt qu rm ro ru sa sc sd si sk sl so sq sr ss su sv sw ta ta_rom te te_rom th tl tn tr ug uk ur ur_rom uz
    vi wo xh yi yo zh-Hans zh-Hant zu""".split()
)
# CC-100's name, then codes of ISO 639-3 with the usual script of ISO 15924, and codes that C4 uses. Where data sets name a
# macrolanguage or its largest member (ara and arb), both are here. Zawgyi (my_zaw) is an encoding and has no code.
_CODES = """
    af afr_Latn; am amh_Ethi; ar ara_Arab arb_Arab; as asm_Beng; az aze_Latn azj_Latn; be bel_Cyrl; bg bul_Cyrl; bn ben_Beng;
    bn_rom ben_Latn; br bre_Latn; bs bos_Latn; ca cat_Latn; cs ces_Latn; cy cym_Latn; da dan_Latn; de deu_Latn; el ell_Grek;
    en eng_Latn; eo epo_Latn; es spa_Latn; et est_Latn ekk_Latn; eu eus_Latn; fa fas_Arab pes_Arab; ff ful_Latn fuv_Latn;
    fi fin_Latn; fr fra_Latn; fy fry_Latn; ga gle_Latn; gd gla_Latn; gl glg_Latn; gn grn_Latn gug_Latn; gu guj_Gujr;
    ha hau_Latn; he heb_Hebr iw; hi hin_Deva; hi_rom hin_Latn; hr hrv_Latn; ht hat_Latn; hu hun_Latn; hy hye_Armn;
    id ind_Latn; ig ibo_Latn; is isl_Latn; it ita_Latn; ja jpn_Jpan; jv jav_Latn; ka kat_Geor; kk kaz_Cyrl; km khm_Khmr;
    kn kan_Knda; ko kor_Hang kor_Kore; ku kur_Latn kmr_Latn; ky kir_Cyrl; la lat_Latn; lg lug_Latn; li lim_Latn; ln lin_Latn;
    lo lao_Laoo; lt lit_Latn; lv lav_Latn lvs_Latn; mg mlg_Latn plt_Latn; mk mkd_Cyrl; ml mal_Mlym; mn mon_Cyrl khk_Cyrl;
    mr mar_Deva; ms msa_Latn zsm_Latn; my mya_Mymr; ne nep_Deva npi_Deva; nl nld_Latn; no nor_Latn nob_Latn nb; ns nso_Latn;
    om orm_Latn gaz_Latn; or ori_Orya ory_Orya; pa pan_Guru; pl pol_Latn; ps pus_Arab pbt_Arab; pt por_Latn;
    qu que_Latn quy_Latn; rm roh_Latn; ro ron_Latn; ru rus_Cyrl; sa san_Deva; sc srd_Latn; sd snd_Arab; si sin_Sinh;
    sk slk_Latn; sl slv_Latn; so som_Latn; sq sqi_Latn als_Latn; sr srp_Cyrl; ss ssw_Latn; su sun_Latn; sv swe_Latn;
    sw swa_Latn swh_Latn; ta tam_Taml; ta_rom tam_Latn; te tel_Telu; te_rom tel_Latn; th tha_Thai; tl tgl_Latn fil_Latn fil;
    tn tsn_Latn; tr tur_Latn; ug uig_Arab; uk ukr_Cyrl; ur urd_Arab; ur_rom urd_Latn; uz uzb_Latn uzn_Latn; vi vie_Latn;
    wo wol_Latn; xh xho_Latn; yi yid_Hebr ydd_Hebr; yo yor_Latn; zh-Hans zho_Hans cmn_Hans cmn_Hani; zh-Hant zho_Hant cmn_Hant;
    zu zul_Latn
"""
OF_CODE = {code: name for name, *codes in map(str.split, _CODES.split(";")) for code in codes}
# Without a script, `hin` is the language in its usual one. `als` is Albanian here and Alemannic in Wikipedia's data sets.
_BARE = {code[:3]: name for code, name in OF_CODE.items() if not name.startswith("zh") and not name.endswith("_rom")}
OF_BARE_CODE = {code: name for code, name in _BARE.items() if code != "als" and len(code) == 3}


def language_of_code(code: str) -> str | None:
    """CC-100's name of a language that a data set names `de`, `deu`, `deu_Latn` or `20231101.de`; None for any other name.

    A script other than the usual one (`srp_Latn`) is no name: it needs a line of the language map.
    """
    last = code.rsplit(".", 1)[-1]
    return last if last in CC100 else OF_CODE.get(last, OF_BARE_CODE.get(last))
