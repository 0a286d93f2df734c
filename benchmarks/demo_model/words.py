"""The words of the demo language: three disjoint lists, one token each."""

KEYS = """
amber agate anchor apple apricot ash aster badger bamboo basil beaver beech birch bison bronze
buffalo cactus camel canyon cardinal carrot cedar cherry chestnut cliff clover cobalt cobra comet
condor copper coral cotton cougar coyote crane cricket crimson crystal cypress daisy dolphin donkey
dove dragon eagle elephant elm emerald falcon fern ferret fig flamingo fox garnet gecko ginger
giraffe glacier goose granite grape gull hamster harbor hawk hazel hedgehog heron holly honey horse
iris island ivory ivy jackal jade jaguar jasmine juniper kettle kiwi lagoon lantern larch laurel
lavender lemon leopard lilac lily lion lizard llama lobster lotus lynx magnet magpie mango maple
marble marigold meadow melon mercury meteor mint mole monkey moose moss moth mustard nectar nutmeg
oak oasis olive onyx opal orange orchid oregano otter owl oyster palm panda panther parrot peach
peacock pear pearl pelican pepper phoenix pigeon pine planet plum poppy puma quail quartz rabbit
raven robin rose ruby saffron salmon sapphire seal shark silver sparrow spruce swan thistle tiger
topaz tulip turtle violet walnut walrus willow wolf zebra zinc
""".split()

VALUES = """
arrow basket bell blanket boat bone book bottle box bread brick bridge broom brush bucket button
cabin candle canvas carpet castle chain chair chalk circle clock cloth cloud coin corner cradle
crown cup curtain desk diamond dish door drum engine eight eleven feather fence field fifty five
flag flame flute forest forty fountain four frame gate ghost glass glove hammer hat helmet hill
hook horn house hundred jacket kite knife knot ladder lake lamp leaf letter lock mirror mountain
nail needle nest net nine ninety one orbit oven page paint paper pencil piano pillow pipe plate
pocket pond prince queen ring river road rocket roof rope sail salt sand scarf seven shell shield
ship shoe shovel six sixty spear spoon spring square star statue stone storm string sun sword table
temple ten tent thirty three thunder ticket tower train tree triangle trumpet tunnel twelve twenty
two umbrella valley vase village violin wagon wall water wave wheel whistle wind window wing zero
""".split()

FILLER = """
and to in it that was he for on with as his they at be this from have or by had not but some we
can out other were all there when up use your how said an each she which do their time if will way
about many then them would write like so these her long make thing see him look more day could go
come did my sound no most number who over know than call first people may down side been now find
any new work part take get place made live where after back little only round man year came show
every good me give our under name very through just form much great think say help low line before
turn cause same mean differ move right boy old too does tell sentence set want air well also play
small end put home read hand port large spell add even land here must big high such follow act why
ask men change went light kind off need house again try us animal point mother world near build
self earth father head stand own should country found answer school grow study still learn plant
cover food between state keep eye never last let thought city cross since hard start might story
far draw left late run while press close night real life few stop open seem together next white
children begin got walk example ease paper group always music those both mark often until mile
""".split()

GRAMMAR = ["the", "code", "of", "is", "what", "song", "continue"]

_seen = {*KEYS, *VALUES, *GRAMMAR}
FILLER = [word for word in dict.fromkeys(FILLER) if word not in _seen]
CONTENT = KEYS + VALUES
WORDS = GRAMMAR + CONTENT + FILLER
