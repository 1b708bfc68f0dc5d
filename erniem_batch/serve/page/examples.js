// The same in ten languages: names in a sentence, a question about it, a sentence on sport, and
// what happens on ice. English has an emoji before its names: it takes two UTF-16 units.

const sentences = (lang, name, text, question, topic, premise, happens, not) =>
  ({ lang, name, text, question, topic, premise, choices: `${not}\n${happens}` });

const ALL = [
  sentences("en", "English",
    "🚲 Amina Mwangi lives in Nairobi and rode to Mombasa for the Red Cross.",
    "Where does Amina Mwangi live?",
    "The team won the final after extra time in front of twenty thousand fans.",
    "The path was covered with ice.", "I slipped and fell.", "I baked a cake."),
  sentences("de", "Deutsch",
    "Hannah Arendt studierte in Heidelberg und lehrte später an der Universität Chicago.",
    "Wo studierte Hannah Arendt?",
    "Die Mannschaft gewann das Finale nach Verlängerung vor zwanzigtausend Fans.",
    "Der Weg war vereist.", "Ich rutschte aus und fiel hin.", "Ich backte einen Kuchen."),
  sentences("fr", "Français",
    "Marie Curie a étudié à Paris et a fondé l'Institut du radium.",
    "Où Marie Curie a-t-elle étudié ?",
    "L'équipe a gagné la finale après prolongation devant vingt mille supporters.",
    "Le chemin était couvert de glace.", "J'ai glissé sur le chemin.", "J'ai préparé un gâteau."),
  sentences("es", "Español",
    "Gabriela Mistral nació en Vicuña y trabajó en la Universidad de Chile.",
    "¿Dónde nació Gabriela Mistral?",
    "El equipo ganó la final en la prórroga ante veinte mil aficionados.",
    "El camino estaba cubierto de hielo.", "Me resbalé y me caí.", "Hice un pastel."),
  sentences("pt", "Português",
    "Fernando Pessoa viveu em Lisboa e escreveu para a revista Orpheu.",
    "Onde viveu Fernando Pessoa?",
    "A equipa ganhou a final no prolongamento perante vinte mil adeptos.",
    "O caminho estava coberto de gelo.", "Escorreguei e caí.", "Fiz um bolo."),
  sentences("ru", "Русский",
    "Анна Ахматова родилась в Одессе и жила в Санкт-Петербурге.",
    "Где родилась Анна Ахматова?",
    "Команда выиграла финал в дополнительное время на глазах у двадцати тысяч болельщиков.",
    "Дорожка покрылась льдом.", "Я поскользнулся и упал.", "Я испёк пирог."),
  sentences("zh", "中文",
    "鲁迅出生于绍兴，曾在北京大学任教。",
    "鲁迅出生于哪里？",
    "球队在加时赛后赢得决赛，两万名球迷到场观看。",
    "小路上结了冰。", "我滑倒了。", "我烤了一个蛋糕。"),
  sentences("ja", "日本語",
    "村上春樹は京都で生まれ、早稲田大学で学んだ。",
    "村上春樹はどこで生まれましたか。",
    "チームは延長戦の末、二万人の観客の前で決勝に勝った。",
    "道が凍っていた。", "私は滑って転んだ。", "私はケーキを焼いた。"),
  sentences("ar", "العربية",
    "عاش جبران خليل جبران في بيروت ثم في باريس.",
    "أين عاش جبران خليل جبران؟",
    "فاز الفريق بالمباراة النهائية بعد وقت إضافي أمام عشرين ألف مشجع.",
    "كان الطريق مغطى بالجليد.", "انزلقت وسقطت.", "خبزت كعكة."),
  sentences("hi", "हिन्दी",
    "इंदिरा गांधी का जन्म इलाहाबाद में हुआ और वे दिल्ली में रहीं।",
    "इंदिरा गांधी का जन्म कहाँ हुआ?",
    "टीम ने बीस हज़ार दर्शकों के सामने अतिरिक्त समय में फ़ाइनल जीता।",
    "रास्ते पर बर्फ़ जमी थी।", "मैं फिसलकर गिर गया।", "मैंने केक बनाया।"),
];

const PLACES = '[{"Person": ["Place of birth"]}, "Location", "Organization"]';
const SCHEMAS = {
  zh: { schema: '[{"人物": ["出生地"]}, "地点", "组织机构"]', schema_lang: "zh" },
  all: { schema: PLACES, schema_lang: "en" },
};

const VALUES = {
  ner: ({ text }) => ({ text }),
  extract: ({ text, lang }) => ({ text, ...(SCHEMAS[lang] ?? SCHEMAS.all) }),
  classify: ({ topic }) => ({ text: topic }),
  qa: ({ text, question }) => ({ question, context: text }),
  choose: ({ premise, choices }) => ({ premise, choices, question_kind: "effect" }),
  // Each with its English twin; English with another sentence.
  embed: ({ topic, lang, premise }) =>
    ({ text: ALL[0].topic, second: lang === "en" ? premise : topic }),
};

/** Examples of a task: language, its own name, and values of the fields. */
export const examplesOf = (task) =>
  ALL.map((one) => ({ lang: one.lang, name: one.name, values: VALUES[task](one) }));
