"""The words of the embedded sample domain: shorthand as a ward writes it, and what it means in plain English."""

# short forms, full name, doses (shorthand, plain), how it is taken (shorthand, plain)
_PO, _INH, _TOP, _SC = ("PO", "by mouth"), ("INH", "by inhaler"), ("TOP", "on the skin"), ("SC", "under the skin")
_MG = {n: (f"{n}mg", f"{n} mg") for n in (2, 4, 5, 10, 20, 25, 40, 50, 75, 80, 100, 200, 250, 300, 400, 500)}
_G = ("1g", "1 g")
_PUFFS = (("2 puffs", "2 puffs"), ("1 puff", "1 puff"))
_THIN = (("thin layer", "a thin layer"),)
DRUGS = (
  (("amox", "amoxicillin"), "amoxicillin", (_MG[250], _MG[500]), _PO),
  (("pcm", "paracet"), "paracetamol", (_G, _MG[500]), _PO),
  (("ibu", "ibuprofen"), "ibuprofen", (_MG[200], _MG[400]), _PO),
  (("fluclox",), "flucloxacillin", (_MG[500], _G), _PO),
  (("doxy",), "doxycycline", (_MG[100], _MG[200]), _PO),
  (("trimeth",), "trimethoprim", (_MG[200],), _PO),
  (("pred",), "prednisolone", (_MG[5], _MG[40]), _PO),
  (("furo", "frus"), "furosemide", (_MG[20], _MG[40]), _PO),
  (("biso",), "bisoprolol", (_MG[5], _MG[10]), _PO),
  (("rami",), "ramipril", (_MG[5], _MG[10]), _PO),
  (("amlod",), "amlodipine", (_MG[5], _MG[10]), _PO),
  (("atorva",), "atorvastatin", (_MG[20], _MG[80]), _PO),
  (("met", "metf"), "metformin", (_MG[500], _G), _PO),
  (("omep",), "omeprazole", (_MG[20], _MG[40]), _PO),
  (("asp", "ASA"), "aspirin", (_MG[75], _MG[300]), _PO),
  (("clopi",), "clopidogrel", (_MG[75], _MG[300]), _PO),
  (("sertr",), "sertraline", (_MG[50], _MG[100]), _PO),
  (("cod", "codeine"), "codeine", (_MG[25], _MG[50]), _PO),
  (("salb", "SABA"), "salbutamol", _PUFFS, _INH),
  (("beclo", "ICS"), "beclometasone", _PUFFS, _INH),
  (("HC 1%", "hydrocort"), "hydrocortisone cream", _THIN, _TOP),
  (("fusid",), "fusidic acid cream", _THIN, _TOP),
  (("enox", "LMWH"), "enoxaparin", (_MG[20], _MG[40]), _SC),
)
FREQUENCIES = (
  ("OD", "once a day"),
  ("BD", "twice a day"),
  ("TDS", "three times a day"),
  ("QDS", "four times a day"),
  ("nocte", "at night"),
  ("mane", "in the morning"),
)
AS_NEEDED = ("PRN", "when you need it")
# 3/7 is 3 days, 2/52 two weeks, 1/12 one month; a course is given in days, a visit in weeks or months
COURSES = (("3/7", "3 days"), ("5/7", "5 days"), ("7/7", "7 days"), ("10/7", "10 days"), ("14/7", "14 days"))
VISITS = (("1/52", "1 week"), ("2/52", "2 weeks"), ("3/52", "3 weeks"), ("6/52", "6 weeks"))
VISITS += (("1/12", "1 month"), ("3/12", "3 months"), ("6/12", "6 months"))
FOLLOW_UP = (
  (("GP", "own GP"), "your family doctor"),
  (("OPD", "clinic"), "the outpatient clinic"),
  (("DN",), "the district nurse"),
  (("physio", "PT"), "the physiotherapist"),
  (("# clinic",), "the fracture clinic"),
  (("dietician", "RD"), "the dietitian"),
  (("cardio OPD",), "the heart clinic"),
  (("PN", "practice RN"), "the practice nurse"),
)
ADVICE = (
  (("incr fluids", "push fluids"), "Drink plenty of fluids."),
  (("NWB L leg",), "Do not put weight on your left leg."),
  (("NWB R leg",), "Do not put weight on your right leg."),
  (("no driving", "not to drive"), "Do not drive."),
  (("low Na diet", "low salt"), "Eat less salt."),
  (("elev leg", "leg up"), "Keep your leg raised."),
  (("keep wnd dry", "wnd dry"), "Keep the wound dry."),
  (("smoking cess", "stop cigs"), "Stop smoking."),
  (("no heavy lifting",), "Do not lift heavy things."),
  (("rpt bloods", "bloods rpt"), "Have another blood test."),
  (("ETOH abst", "no ETOH"), "Do not drink alcohol."),
  (("daily wt", "wt daily"), "Weigh yourself every day."),
)
HISTORY = (
  ("HTN", "high blood pressure"),
  ("T2DM", "diabetes"),
  ("COPD", "chronic lung disease"),
  ("AF", "an irregular heartbeat"),
  ("CKD", "kidney disease"),
  ("IHD", "heart disease"),
  ("OA", "worn joints"),
  ("hypothyr", "an underactive thyroid"),
  ("nil", "no earlier illness"),
)
# level (0 can wait, 1 the same day, 2 at once): shorthand variants, plain words
COMPLAINTS = (
  (2, ("CP rad L arm", "crushing CP"), "chest pain going to the left arm"),
  (2, ("SOB at rest", "SOBAR"), "shortness of breath at rest"),
  (2, ("facial droop, dysarthria", "FAST +ve"), "a drooping face and slurred speech"),
  (2, ("haematemesis", "vomiting blood++"), "vomiting blood"),
  (2, ("tongue swelling, stridor", "stridor"), "a swelling tongue and noisy breathing"),
  (2, ("fitting", "tonic clonic sz ongoing"), "a fit that does not stop"),
  (2, ("collapse, LOC", "LOC++"), "a collapse with loss of consciousness"),
  (1, ("RIF pain, guarding", "RIF pain"), "pain low on the right of the belly"),
  (1, ("cellulitis spreading", "spreading cellulitis"), "a spreading skin infection"),
  (1, ("D&V, dry", "D+V x3/7"), "diarrhoea and vomiting"),
  (1, ("dysuria, loin pain", "loin pain, rigors"), "pain in the side when passing water"),
  (1, ("# wrist, NVI", "FOOSH, ?# wrist"), "a broken wrist"),
  (1, ("hot swollen calf", "calf pain ?DVT"), "a hot swollen calf"),
  (1, ("palps", "palpitations"), "a racing heart"),
  (0, ("med r/v", "meds review"), "a review of the tablets"),
  (0, ("OA knee pain", "knee pain x6/12"), "an aching knee"),
  (0, ("BP check", "for BP check"), "a blood pressure check"),
  (0, ("dry itchy skin", "eczema flare"), "itchy skin"),
  (0, ("wnd check", "for wnd r/v"), "a check of the wound"),
  (0, ("LBP, no red flags", "mech LBP"), "low back pain"),
  (0, ("insomnia", "poor sleep"), "poor sleep"),
  (0, ("rpt script", "rpt Rx"), "a repeat prescription"),
)
# name variants, unit, the values seen at each level, plain words
VITALS = (
  (("sats", "SpO2"), "%", ((96, 97, 98, 99), (91, 92, 93), (82, 84, 86)), "oxygen level"),
  (("HR", "P"), "", ((66, 70, 74, 78), (114, 118, 122), (34, 150, 155)), "pulse"),
  (("RR",), "", ((13, 14, 16), (24, 26), (34, 36, 38)), "breathing rate"),
  (("GCS",), "", ((15,), (14,), (7, 8, 9)), "coma score"),
  (("SBP",), "", ((115, 120, 125, 130), (175, 180), (72, 75, 80)), "blood pressure"),
)
PRESENT = ("c/o {}", "pw {}", "{}", "Adm with {}")
PRIORITY = ("can wait for a planned visit", "should be seen today", "needs to be seen at once")
LABELS = ("routine", "urgent", "emergency")
