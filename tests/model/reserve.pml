/*
 * A reservation's range between the cache, which fills it while it is lent, and the clients that claim it: in turn, without a
 * message, with one compare-and-swap of the claim word. A claim touches no life word, so a load looks at the claim too.
 *
 * Page 0 is the range of reservation 1, whose entry is the only one, and holds slot 0. One client loads slot 0, another changes it
 * at some moment. The reclaim thread promotes slot 0 or another one. Holders claim, write a guest's bytes, find them there, and
 * lend again.
 *
 * Shows: a load returns no guest's byte; what it returns is whole and was the slot's latest value at some moment between its
 * start and its end; only who holds a page writes its bytes and its life; no two hold it at once; the owner in a life is the
 * entry in whose range the page lies; who waits for a claim gets it, also when its claimer has died, or the broker (who would wait
 * for ever hangs, and the verifier reports it as an invalid end state).
 *
 * Bounds: one entry, two pages, one load, one change of the slot, few promotions and claims; not all at once, but in scenes:
 *   SCENE_LEND     a load, two promotions, two holders that claim in turn
 *   SCENE_RELEASE  a load, a promotion, a release, a buffer in the same place or not, a new reservation in the same entry, in the
 *                  same place or not; somebody claims by the old reservation meanwhile, and may be killed
 *   SCENE_DEATH    a load, two promotions, two holders, the first killed at any step, the death pass
 *   SCENE_BROKER   the same, and the broker is killed, too, at any step of a promotion or of the death pass
 * Abstracted: where slot 0 is when it is in no area page, nursery or file, is all one (load.pml); another slot's page has a key and
 * bytes, no word; copying half a page is one step; store buffers (claim.pml).
 */
#include "common.pml"

#define ENTRY  1        /* the owner in a life */
#define PAGES  2
#define OTHER  3        /* what another slot holds */

/* claim: generation · client:2 */
#define LENT    0
#define BROKER  1
#define FIRST   2       /* clients */
#define SECOND  3
#define CLAIM(generation, client) ((generation) << 2 | (client))
#define CLAIMER(c)      ((c) & 3)
#if defined(FAULT_CLAIM_KEEPS_GENERATION)
#define HAND(c, client) CLAIM((c) >> 2, client)
#else
#define HAND(c, client) CLAIM(((c) >> 2) + 1, client)
#endif

#define RENTER  4       /* holds a buffer */
#define GUEST(holder) (4 + (holder))    /* the byte it writes */

#define KEPT_PUBLISHED(l) LIFE(SEQUENCE(l), PUBLISHED, OWNER(l))

#if defined(SCENE_LEND)
#define SCENE(lend, turns, death, release, stale) lend
#elif defined(SCENE_TURNS)
#define SCENE(lend, turns, death, release, stale) turns
#elif defined(SCENE_DEATH)
#define SCENE(lend, turns, death, release, stale) death
#elif defined(SCENE_RELEASE)
#define SCENE(lend, turns, death, release, stale) release
#elif defined(SCENE_STALE)
#define SCENE(lend, turns, death, release, stale) stale
#endif
#define PROMOTIONS  SCENE(2, 2, 1, 2, 1)
#define LOADS       SCENE(true, false, true, true, false)
#define STORES      SCENE(true, false, false, false, false)
#define HOLDS       SCENE(2, 1, 0, 0, 0)        /* claims of the second holder */
#define CLIENT_DIES SCENE(false, true, true, false, true)
#define BROKER_DIES SCENE(false, true, true, false, false)
#define RELEASES    SCENE(false, false, false, true, true)

short word;             /* of slot 0 */
short life[PAGES];
bool  key[PAGES];       /* slot 0, or the other */
byte  page_value[PAGES];
short claim;
byte  entry;            /* the entry's state: which reservation it is, 0: none */
byte  filling, taking;  /* page + 1 */

bool  killed, killed_broker;    /* the first client; the broker */
bool  gone, gone_reclaimer, gone_controller;    /* takes no more steps: dead or done */

byte  range[3];         /* ghost: the page of each reservation; a client knows it from the answer */
byte  ranged;           /* ghost: the page whose owner may be the entry, plus one */
byte  held[PAGES];      /* ghost: who may write the page's bytes and its life */
byte  latest;           /* ghost: what slot 0 holds */
byte  seen;             /* ghost: every value that was the latest since the load began, one bit each */

#define ENDED_BROKER (killed_broker && gone_reclaimer && gone_controller)
#define DEAD(who) (((who) == FIRST && killed && gone) || ((who) == BROKER && ENDED_BROKER))
#ifdef FAULT_CLAIM_TAKES_OVER_LIVING
#define TO_BE_HAD(c) (CLAIMER(c) == LENT || CLAIMER(c) == BROKER)
#else
#define TO_BE_HAD(c) (CLAIMER(c) == LENT || (CLAIMER(c) == BROKER && ENDED_BROKER))
#endif

/* These five are used inside a d_step. */
inline hold(page, who) {
    assert(held[page] == 0 || DEAD(held[page]));
    held[page] = who
}

inline hand(client) {
    CAS(won, claim, c, HAND(c, client));
    c = (won -> claim : c)
}

inline change_life(page, old, new) {
    assert(life[page] == old);
    life[page] = new
}

inline unheld(page) {
    assert(held[page] == 0)
}

inline swing(state, page) {
    CAS(won, word, w, NEXT(w, state, 0, page))
}

proctype reader() {
    short w, l, c;
    byte value;
    bool won, fit;
    seen = 1 << latest;
start:
    atomic { w = word; l = 0; c = 0; value = 0; won = false }
    if
    :: STATE(w) == CACHED ->
        l = life[PAGE(w)];      /* @load.life */
        if
        :: word != w -> goto start
        :: word == w            /* @load.again */
        fi;
        fit = (LIFE_STATE(l) == PUBLISHED && !key[PAGE(w)]);
#ifndef FAULT_LOAD_WITHOUT_CLAIM
        if
        :: fit && OWNER(l) -> c = claim; fit = (CLAIMER(c) == LENT)     /* @load.claim */
        :: !fit || !OWNER(l)
        fi;
#endif
        if
        :: !fit -> d_step { swing(SPILLED, 0) } goto start              /* @load.heal */
        :: fit
        fi;
        value = page_value[PAGE(w)];    /* @load.copy */
        if
        :: SEQUENCE(life[PAGE(w)]) != SEQUENCE(l) -> goto start
        :: SEQUENCE(life[PAGE(w)]) == SEQUENCE(l)       /* @load.recheck */
        fi;
#if defined(FAULT_LOAD_WITHOUT_CLAIM)
        if
        :: OWNER(l) && CLAIMER(claim) != LENT -> goto start
        :: !OWNER(l) || CLAIMER(claim) == LENT
        fi;
#elif !defined(FAULT_LOAD_WITHOUT_CLAIM_AGAIN)
        if
        :: OWNER(l) && claim != c -> goto start
        :: !OWNER(l) || claim == c      /* @load.claim_again */
        fi;
#endif
        assert(value < OTHER && (seen & (1 << value)))
    :: STATE(w) != CACHED       /* elsewhere */
    fi;
    d_step { fit = false; w = 0; l = 0; c = 0; value = 0; won = false; seen = 0 }
}

/* A store. Where the new value is does not matter here. */
proctype storer() {
    d_step { latest = 2; seen = seen | (1 << 2); word = NEXT(word, SPILLED, 0, 0) }
}

/* The broker's reclaim thread. */

/* In this order: a range that is not being taken any more shows in life, and a life's owner where to look for the claim. */
inline look(page) {
    yields = (taking == page + 1);
    l = life[page];
    yields = yields || (LIFE_STATE(l) == BUFFER) || (OWNER(l) && CLAIMER(claim) != LENT)
}

/* Another slot's page, or slot 0 from wherever it is. */
inline promote(page, other) {
    atomic { moving = word; value = (other -> OTHER : latest); look(page) }
    if
    :: !yields && (other || STATE(moving) != CACHED) ->
        filling = page + 1;             /* @promote.announce */
#ifndef FAULT_PROMOTE_IGNORES_CLAIM
        look(page);
#endif
        won = !yields;
        if
        :: won && LIFE_STATE(l) == PUBLISHED ->
            w = (key[page] -> 0 : word);
            if
            :: NAMES(w, page) -> d_step { swing(SPILLED, 0) }
            :: !NAMES(w, page)
            fi;
            if
            :: won -> d_step { CAS(won, life[page], l, ADVANCE(l, FREE, OWNER(l))); l = life[page] }
            :: !won
            fi
        :: !won || LIFE_STATE(l) != PUBLISHED           /* @promote.yield */
        fi;
        if
        :: won ->
            d_step {
                unheld(page);
#if defined(FAULT_PROMOTE_DROPS_OWNER)
                CAS(won, life[page], l, ADVANCE(l, GRANTED, 0));
#elif defined(FAULT_GRANT_ANY_LIFE)
                life[page] = ADVANCE(l, GRANTED, OWNER(l));
#else
                CAS(won, life[page], l, ADVANCE(l, GRANTED, OWNER(l)));         /* @promote.grant */
#endif
                l = life[page];
                assert(!won || OWNER(l) == 0 || ranged == page + 1)
            }
        :: !won
        fi;
        if
        :: won ->
            d_step { unheld(page); key[page] = other }
            d_step { unheld(page); page_value[page] = value }           /* @promote.copy */
            d_step { change_life(page, l, KEPT_PUBLISHED(l)) }          /* @promote.publish */
            if
            :: !other ->
                d_step { w = moving; swing(CACHED, page) }              /* @promote.swing */
                if
                :: !won -> d_step { change_life(page, KEPT_PUBLISHED(l), ADVANCE(l, FREE, OWNER(l))) }  /* @promote.drop */
                :: won
                fi
            :: other
            fi
        :: !won
        fi;
        filling = 0                     /* @promote.done */
    :: yields || (!other && STATE(moving) == CACHED)
    fi;
    d_step { l = 0; w = 0; moving = 0; value = 0; won = false; yields = false }
}

proctype reclaimer() {
    short w, l, moving;
    byte value, n;
    bool won, yields;
    {
        do
        :: n < PROMOTIONS -> n++; promote(0, false)
        :: n < PROMOTIONS -> n++; promote(0, true)
        :: RELEASES && n < PROMOTIONS -> n++; promote(1, false)
        :: break        /* nobody may depend on its going on */
        od
    } unless { killed_broker };
    atomic { gone_reclaimer = true; n = 0; l = 0; w = 0; moving = 0; value = 0; won = false; yields = false }
}

/* Who holds a range changes its life words by plain loads and stores. */
inline sweep(page, state, owner) {
    l = life[page];
    d_step { change_life(page, l, ADVANCE(l, state, owner)); l = 0 }
}

inline write_and_find(page, guest) {
    page_value[page] = guest;
    assert(page_value[page] == guest)
}

/* The wait of a client. A claim that is a dead client's while the broker is dead, too, is nobody's to clean up: give up. */
#define WORTH_A_LOOK(n) (TO_BE_HAD(claim) || entry != (n) || (DEAD(CLAIMER(claim)) && ENDED_BROKER))
#ifdef FAULT_CLAIM_WITHOUT_STATE
#define STALE(n) false
#else
#define STALE(n) (entry != (n))
#endif

inline claim_use_lend(me, n) {
    do
    :: atomic { WORTH_A_LOOK(n) -> c = claim }
        if
        :: STALE(n) || !TO_BE_HAD(c) -> break
        :: !STALE(n) && TO_BE_HAD(c)
        fi;
        d_step { hand(me); assert(!won || entry == n) }         /* @claim.word */
        if
        :: won -> break
        :: !won
        fi
    od;
    if
    :: won && filling == range[n] + 1 ->
        /* Gives up: nothing was written under this claim, so no life has to change, nor may it during the broker's copy. */
#ifdef FAULT_GIVE_UP_SWEEPS
        sweep(range[n], FREE, ENTRY);
#endif
        d_step { hand(LENT); assert(won) }          /* @claim.yield */
#ifdef FAULT_CLAIM_IGNORES_FILLING
    :: won ->
#else
    :: won && (filling != range[n] + 1 || ENDED_BROKER) ->      /* @claim.wait */
#endif
        d_step { hold(range[n], me) }
        write_and_find(range[n], GUEST(me));
#if defined(FAULT_LEND_WITHOUT_LIFE)
        d_step { held[range[n]] = 0; hand(LENT) }
#elif defined(FAULT_LEND_WORD_BEFORE_LIFE)
        d_step { held[range[n]] = 0; hand(LENT) }
        d_step { life[range[n]] = ADVANCE(life[range[n]], FREE, ENTRY) }
#else
        sweep(range[n], FREE, ENTRY);   /* @lend.life */
        d_step { held[range[n]] = 0; hand(LENT); assert(won) }          /* @lend.word */
#endif
    :: !won
    fi;
    d_step { c = 0; l = 0; won = false }
}

proctype mortal() {
    short l, c;
    bool won;
    {
        claim_use_lend(FIRST, 1)
    } unless { killed };
    atomic { gone = true; c = 0; l = 0; won = false }
}

proctype holder() {
    short l, c;
    byte n;
    bool won;
    do
    :: n < HOLDS -> n++; claim_use_lend(SECOND, 1)
    :: n == HOLDS -> break
    od
}

/* The broker's control thread. */

inline take(page, state, owner) {
    taking = page + 1;          /* @take.announce */
    filling != page + 1;        /* @take.wait */
    d_step { hold(page, BROKER) }
    l = life[page];
#ifdef FAULT_TAKE_KEEPS_SEQUENCE
    l = l - LIFE(1, 0, 0);
    d_step { life[page] = ADVANCE(l, state, owner) }
#else
    d_step { change_life(page, l, ADVANCE(l, state, owner)) }   /* @take.life */
#endif
    d_step { held[page] = 0; ranged = (owner -> page + 1 : ranged); l = 0 }
    taking = 0                  /* @take.done */
}

inline bury() {
    gone;
    c = claim;
#ifdef FAULT_DEATH_KEEPS_CLAIM
    c = LENT;
#endif
    if
    :: DEAD(CLAIMER(c)) ->
        d_step { hand(BROKER); assert(won) }            /* @death.claim */
#ifndef FAULT_DEATH_IGNORES_FILLING
        filling != 1;                                   /* @take.wait */
#endif
        d_step { hold(0, BROKER) }
#ifndef FAULT_DEATH_WITHOUT_LIFE
        sweep(0, FREE, ENTRY);
#endif
        d_step { held[0] = 0; hand(LENT); assert(won) }
    :: !DEAD(CLAIMER(c))
    fi
}

inline release() {
#ifndef FAULT_RELEASE_WITHOUT_CLAIM
    do
    :: atomic { CLAIMER(claim) == LENT || DEAD(CLAIMER(claim)) -> c = claim }
        d_step { hand(BROKER) }         /* @release.word */
        if
        :: won -> break
        :: !won
        fi
    od;
#endif
#ifndef FAULT_RELEASE_IGNORES_FILLING
    filling != 1;
#endif
    atomic { hold(0, BROKER); l = life[0] }
    d_step { change_life(0, l, ADVANCE(l, FREE, 0)); held[0] = 0; ranged = 0 }          /* @release.life */
    entry = 0
}

inline rent() {
    take(0, BUFFER, 0);
    d_step { hold(0, RENTER) }
    write_and_find(0, GUEST(RENTER));
    d_step { held[0] = 0; life[0] = ADVANCE(life[0], FREE, 0) }  /* @give.life */
}

/* A new reservation in the entry. */
inline reserve(page) {
#ifdef FAULT_CLAIM_STARTS_ANEW
    claim = CLAIM(0, LENT);
#else
    d_step { hand(LENT) }
#endif
    range[2] = page;
    take(page, FREE, ENTRY);
    entry = 2
}

proctype controller() {
    short l, c;
    bool won;
    {
        if
        :: RELEASES ->
            release();
            if
            :: rent()
            :: skip
            fi;
            if
            :: reserve(0)
            :: reserve(1)
            fi;
            claim_use_lend(SECOND, 2)
        :: !RELEASES -> bury()
        fi
    } unless { killed_broker };
    atomic { gone_controller = true; c = 0; l = 0; won = false }
}

init {
    d_step {
        life[0] = LIFE(0, PUBLISHED, ENTRY);
        word = WORD(0, CACHED, 0, 0);
        page_value[0] = 1; latest = 1;
        entry = 1;
        ranged = 1
    }
    atomic {
        run reclaimer();
        if
        :: LOADS -> run reader()
        :: else
        fi;
        if
        :: STORES -> run storer()
        :: else
        fi;
        if
        :: HOLDS -> run holder()
        :: else
        fi;
        if
        :: CLIENT_DIES -> run mortal()
        :: else
        fi;
        if
        :: CLIENT_DIES || RELEASES -> run controller()
        :: else
        fi
    }
    if
    :: CLIENT_DIES -> killed = true
    :: true
    fi;
    if
    :: BROKER_DIES -> killed_broker = true
    :: true
    fi
}
