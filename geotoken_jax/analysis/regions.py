"""Countries and continents of photos, from English names in several spellings or ISO 3166 codes."""

import functools
import unicodedata
from collections.abc import Mapping

#: Name of the country or continent of a photo whose source has none.
UNKNOWN = "unknown"

#: Continent -> its countries, as "CODE name/other name; CODE name; ...". CODE is the ISO 3166 code. Names and
#: continents are taken from GeoNames, as in EarthView: Russia is in Europe, Turkey and Georgia are in Asia.
_COUNTRIES = {
    "Africa": """
        AO Angola; BF Burkina Faso; BI Burundi; BJ Benin; BW Botswana; CD Democratic Republic of the Congo/DR
        Congo/Congo-Kinshasa; CF Central African Republic; CG Republic of the Congo/Congo-Brazzaville/Congo; CI Ivory
        Coast/Côte d'Ivoire; CM Cameroon; CV Cabo Verde/Cape Verde; DJ Djibouti; DZ Algeria; EG Egypt; EH Western
        Sahara; ER Eritrea; ET Ethiopia; GA Gabon; GH Ghana; GM Gambia; GN Guinea; GQ Equatorial Guinea; GW
        Guinea-Bissau; KE Kenya; KM Comoros; LR Liberia; LS Lesotho; LY Libya; MA Morocco; MG Madagascar; ML Mali; MR
        Mauritania; MU Mauritius; MW Malawi; MZ Mozambique; NA Namibia; NE Niger; NG Nigeria; RE Reunion; RW Rwanda; SC
        Seychelles; SD Sudan; SH Saint Helena; SL Sierra Leone; SN Senegal; SO Somalia; SS South Sudan; ST Sao Tome and
        Principe; SZ Eswatini/Swaziland; TD Chad; TG Togo; TN Tunisia; TZ Tanzania; UG Uganda; YT Mayotte; ZA South
        Africa; ZM Zambia; ZW Zimbabwe
    """,
    "Antarctica": """
        AQ Antarctica; BV Bouvet Island; GS South Georgia and the South Sandwich Islands; HM Heard Island and McDonald
        Islands; TF French Southern Territories
    """,
    "Asia": """
        AE United Arab Emirates; AF Afghanistan; AM Armenia; AZ Azerbaijan; BD Bangladesh; BH Bahrain; BN Brunei; BT
        Bhutan; CC Cocos Islands/Cocos (Keeling) Islands; CN China; GE Georgia; HK Hong Kong; ID Indonesia; IL Israel;
        IN India; IO British Indian Ocean Territory; IQ Iraq; IR Iran; JO Jordan; JP Japan; KG Kyrgyzstan; KH Cambodia;
        KP North Korea; KR South Korea/Republic of Korea/Korea; KW Kuwait; KZ Kazakhstan; LA Laos; LB Lebanon; LK Sri
        Lanka; MM Myanmar/Burma; MN Mongolia; MO Macao/Macau; MV Maldives; MY Malaysia; NP Nepal; OM Oman; PH
        Philippines; PK Pakistan; PS Palestinian Territory/Palestine; QA Qatar; SA Saudi Arabia; SG Singapore; SY Syria;
        TH Thailand; TJ Tajikistan; TM Turkmenistan; TR Turkey/Türkiye; TW Taiwan; UZ Uzbekistan; VN Vietnam; YE Yemen
    """,
    "Europe": """
        AD Andorra; AL Albania; AT Austria; AX Aland Islands; BA Bosnia and Herzegovina; BE Belgium; BG Bulgaria; BY
        Belarus; CH Switzerland; CY Cyprus; CZ Czechia/Czech Republic; DE Germany; DK Denmark; EE Estonia; ES Spain; FI
        Finland; FO Faroe Islands; FR France; GB United Kingdom/Great Britain/UK; GG Guernsey; GI Gibraltar; GR Greece;
        HR Croatia; HU Hungary; IE Ireland; IM Isle of Man; IS Iceland; IT Italy; JE Jersey; LI Liechtenstein; LT
        Lithuania; LU Luxembourg; LV Latvia; MC Monaco; MD Moldova; ME Montenegro; MK North Macedonia/Macedonia; MT
        Malta; NL The Netherlands; NO Norway; PL Poland; PT Portugal; RO Romania; RS Serbia; RU Russia/Russian
        Federation; SE Sweden; SI Slovenia; SJ Svalbard and Jan Mayen; SK Slovakia; SM San Marino; UA Ukraine; VA
        Vatican/Vatican City/Holy See; XK Kosovo
    """,
    "North America": """
        AG Antigua and Barbuda; AI Anguilla; AW Aruba; BB Barbados; BL Saint Barthelemy; BM Bermuda; BQ Bonaire, Saint
        Eustatius and Saba/Caribbean Netherlands; BS Bahamas; BZ Belize; CA Canada; CR Costa Rica; CU Cuba; CW Curacao;
        DM Dominica; DO Dominican Republic; GD Grenada; GL Greenland; GP Guadeloupe; GT Guatemala; HN Honduras; HT
        Haiti; JM Jamaica; KN Saint Kitts and Nevis; KY Cayman Islands; LC Saint Lucia; MF Saint Martin; MQ Martinique;
        MS Montserrat; MX Mexico; NI Nicaragua; PA Panama; PM Saint Pierre and Miquelon; PR Puerto Rico; SV El Salvador;
        SX Sint Maarten; TC Turks and Caicos Islands; TT Trinidad and Tobago; US United States/United States of
        America/USA; VC Saint Vincent and the Grenadines; VG British Virgin Islands; VI U.S. Virgin Islands
    """,
    "Oceania": """
        AS American Samoa; AU Australia; CK Cook Islands; CX Christmas Island; FJ Fiji; FM Micronesia/Federated States
        of Micronesia; GU Guam; KI Kiribati; MH Marshall Islands; MP Northern Mariana Islands; NC New Caledonia; NF
        Norfolk Island; NR Nauru; NU Niue; NZ New Zealand; PF French Polynesia; PG Papua New Guinea; PN
        Pitcairn/Pitcairn Islands; PW Palau; SB Solomon Islands; TK Tokelau; TL Timor Leste; TO Tonga; TV Tuvalu; UM
        United States Minor Outlying Islands; VU Vanuatu; WF Wallis and Futuna; WS Samoa
    """,
    "South America": """
        AR Argentina; BO Bolivia; BR Brazil; CL Chile; CO Colombia; EC Ecuador; FK Falkland Islands; GF French Guiana;
        GY Guyana; PE Peru; PY Paraguay; SR Suriname; UY Uruguay; VE Venezuela
    """,
}


def country(text: str) -> str:
    """Returns the main name of a country, given one of its names or its ISO code.

    A text that is not in the list is returned without spaces at both ends; an empty text gives UNKNOWN.
    """
    return _known().get(_key(text), (text.strip(), ""))[0] or UNKNOWN


def continent(names: Mapping[str, str]) -> str:
    """Returns a photo's continent. It is the continent of the country, if the country is in the list, else the photo's
    own `continent`, else UNKNOWN.

    names: place names with the keys `country` and `continent`.
    """
    return _known().get(_key(names["country"]), ("", names["continent"].strip()))[1] or UNKNOWN


@functools.cache
def _known() -> dict[str, tuple[str, str]]:
    """Returns `_key(spelling)` -> (name, continent), for every spelling of every country."""
    known = {}
    for continent, listed in _COUNTRIES.items():
        for entry in " ".join(listed.split()).split("; "):
            code, names = entry.split(" ", 1)
            name, *others = names.split("/")
            known.update({_key(spelling): (name, continent) for spelling in (code, name, *others)})
    return known


@functools.lru_cache(maxsize=4096)  # a gallery of millions of photos has about a hundred countries
def _key(text: str) -> str:
    """Returns a name without accents, capitals, punctuation and a leading "the", so that its spellings become equal."""
    plain = unicodedata.normalize("NFKD", text)
    letters = "".join(c if c.isalnum() else " " for c in plain if not unicodedata.combining(c))
    return " ".join(letters.casefold().split()).removeprefix("the ")
