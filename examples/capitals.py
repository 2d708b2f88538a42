"""A real model learns to name a capital instead of talking around it, and briefly, on countries it is not trained on.

estune train --config examples/capitals.yaml

A third of the countries are held out.
"""

from estune.rewards.conciseness import correct_reward, length_reward

CAPITALS = {
    "Afghanistan": "Kabul", "Albania": "Tirana", "Algeria": "Algiers", "Angola": "Luanda", "Armenia": "Yerevan",
    "Australia": "Canberra", "Austria": "Vienna", "Azerbaijan": "Baku", "Bahrain": "Manama", "Bangladesh": "Dhaka",
    "Belarus": "Minsk", "Belgium": "Brussels", "Bhutan": "Thimphu", "Bosnia and Herzegovina": "Sarajevo",
    "Botswana": "Gaborone", "Brazil": "Brasilia", "Bulgaria": "Sofia", "Cameroon": "Yaounde", "Canada": "Ottawa",
    "Chile": "Santiago", "China": "Beijing", "Colombia": "Bogota", "Croatia": "Zagreb", "Cuba": "Havana",
    "Cyprus": "Nicosia", "the Czech Republic": "Prague", "Denmark": "Copenhagen", "Ecuador": "Quito",
    "Egypt": "Cairo", "Eritrea": "Asmara", "Estonia": "Tallinn", "Fiji": "Suva", "Finland": "Helsinki",
    "France": "Paris", "Georgia": "Tbilisi", "Germany": "Berlin", "Ghana": "Accra", "Greece": "Athens",
    "Guyana": "Georgetown", "Honduras": "Tegucigalpa", "Hungary": "Budapest", "Iceland": "Reykjavik",
    "Indonesia": "Jakarta", "Iran": "Tehran", "Iraq": "Baghdad", "Ireland": "Dublin", "Israel": "Jerusalem",
    "Italy": "Rome", "Jamaica": "Kingston", "Japan": "Tokyo", "Jordan": "Amman", "Kenya": "Nairobi",
    "Kyrgyzstan": "Bishkek", "Laos": "Vientiane", "Latvia": "Riga", "Lebanon": "Beirut", "Liberia": "Monrovia",
    "Libya": "Tripoli", "Lithuania": "Vilnius", "Madagascar": "Antananarivo", "Malawi": "Lilongwe",
    "Maldives": "Male", "Mali": "Bamako", "Malta": "Valletta", "Moldova": "Chisinau", "Mongolia": "Ulaanbaatar",
    "Morocco": "Rabat", "Mozambique": "Maputo", "Namibia": "Windhoek", "Nepal": "Kathmandu",
    "the Netherlands": "Amsterdam", "New Zealand": "Wellington", "Nicaragua": "Managua", "Niger": "Niamey",
    "Nigeria": "Abuja", "North Korea": "Pyongyang", "Norway": "Oslo", "Oman": "Muscat", "Pakistan": "Islamabad",
    "Paraguay": "Asuncion", "Peru": "Lima", "the Philippines": "Manila", "Poland": "Warsaw", "Portugal": "Lisbon",
    "Qatar": "Doha", "Romania": "Bucharest", "Russia": "Moscow", "Rwanda": "Kigali", "Saudi Arabia": "Riyadh",
    "Senegal": "Dakar", "Serbia": "Belgrade", "Slovakia": "Bratislava", "Slovenia": "Ljubljana",
    "Somalia": "Mogadishu", "South Korea": "Seoul", "Spain": "Madrid", "Sudan": "Khartoum", "Sweden": "Stockholm",
    "Switzerland": "Bern", "Syria": "Damascus", "Taiwan": "Taipei", "Tajikistan": "Dushanbe", "Tanzania": "Dodoma",
    "Thailand": "Bangkok", "Tunisia": "Tunis", "Turkey": "Ankara", "Turkmenistan": "Ashgabat", "Uganda": "Kampala",
    "Ukraine": "Kyiv", "the United Kingdom": "London", "Uruguay": "Montevideo", "Uzbekistan": "Tashkent",
    "Venezuela": "Caracas", "Vietnam": "Hanoi", "Yemen": "Sanaa", "Zambia": "Lusaka", "Zimbabwe": "Harare",
}  # fmt: skip
HELD_OUT = 3  # one country in so many

rows = [
    {"prompt": f"What is the capital of {country}? Answer in one word.", "answer": capital}
    for country, capital in CAPITALS.items()
]
train = [row for number, row in enumerate(rows) if number % HELD_OUT]
evaluation = rows[::HELD_OUT]

rewards = [correct_reward, length_reward]
weights = [0.5, 0.01]
