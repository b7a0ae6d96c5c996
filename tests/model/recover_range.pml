/*
 * What a broker leaves behind in an area when it is killed inside a promotion, an allocation, a release or the death pass of a claimer;
 * and what its successor does about it, which may be killed itself, while clients load, claim and lend without a message.
 *
 * Page 0 is the only page. At first it holds slot 0 and lies in a reservation (entry 1), or is free and lent (SCENE_ALLOC), where a
 * buffer (entry 2) is then allocated. The first broker has two threads, the second and the third do one thing after another: take
 * over, then their duty, then a promotion.
 *
 * Shows: a load returns no guest's byte, and the slot's value; only who holds the page writes its bytes; no two hold it at once; its
 * life never takes a sequence again; a holder keeps what it holds; at the end nothing is granted, announced, claimed by the dead or
 * by a broker, and no entry is in use that nobody holds. Who waits for a broker that never goes on hangs, and the verifier reports
 * it as an invalid end state.
 *
 * Bounds: one page, one load, one promotion of each broker, two deaths of brokers, one of a client; in scenes:
 *   SCENE_LOAD     a client claims and lends, and may be killed; and a load
 *   SCENE_TURNS    two clients claim and lend, the first may be killed
 *   SCENE_RELEASE  the reservation is released; a client whose session is over claims it still, and may be killed
 *   SCENE_ALLOC    a buffer is allocated and freed; and a load
 *   SCENE_STOP     one claim; the successor may stop for ever at any step, and there is no third
 * Abstracted: a page holds a value whole; where slot 0 is when it is not in the area (load.pml); two threads in the successor
 * (load.pml, reserve.pml, claim.pml); the two words of a signature are one, for a mixture of an old and a new one looks ended, as the
 * old one does; the answers and questions of the control plane: a client knows of its buffer when its holder bit is set.
 */
#include "common.pml"

#define ENTRY   1       /* owners: the reservation, the buffer */
#define RENTED  2
#define OTHER   3       /* what another slot holds */
#define VALUE   1       /* what slot 0 holds */

/* claim: generation · client:2 */
#define LENT    0
#define BROKER  1
#define FIRST   2       /* clients */
#define SECOND  3
#define CLAIM(generation, client) ((generation) << 2 | (client))
#define CLAIMER(c)      ((c) & 3)
#define HAND(c, client) CLAIM(((c) >> 2) + 1, client)

#define RENTER  4       /* holds a buffer */
#define GUEST(holder) (4 + (holder))

#define KEPT_PUBLISHED(l) LIFE(SEQUENCE(l), PUBLISHED, OWNER(l))

#if defined(SCENE_LOAD)
#define SCENE(load, turns, release, alloc, stop) load
#elif defined(SCENE_TURNS)
#define SCENE(load, turns, release, alloc, stop) turns
#elif defined(SCENE_RELEASE)
#define SCENE(load, turns, release, alloc, stop) release
#elif defined(SCENE_ALLOC)
#define SCENE(load, turns, release, alloc, stop) alloc
#elif defined(SCENE_STOP)
#define SCENE(load, turns, release, alloc, stop) stop
#endif
#define LOADS       SCENE(true, false, false, true, false)
#define CLIENT_DIES SCENE(true, true, true, false, false)       /* the first client claims */
#define HOLDS       SCENE(false, true, false, false, true)      /* the second client claims */
#define RELEASES    SCENE(false, false, true, false, false)
#define RENTS       SCENE(false, false, false, true, false)
#define STOPS       SCENE(false, false, false, false, true)
#define DEATHS      SCENE(1, 2, 2, 2, 1)    /* of brokers */
#define PROMOTERS   SCENE(2, 1, 3, 3, 1)    /* brokers that promote */

short word;             /* of slot 0 */
short life;
bool  key;              /* slot 0, or the other */
byte  page_value;
short claim;            /* of entry 1 */
bool  reserved, rented; /* the state of each entry: in use, by its kind */
bool  known[3];           /* by owner: somebody holds it */
bool  filling, taking;

byte  signature;           /* which broker */
byte  ended;            /* so many have: the kernel's word */
byte  killed;           /* so many are, or are about to be */
bool  killed_client, gone_client, gone_reclaimer, gone_controller, gone_holder, stopped, done_renting;

byte  held;             /* ghost: who may write the page's bytes and its life */
bool  written;          /* ghost: a claimer's bytes are there, and the life has not moved on */

#define ENDED_BROKER (signature < ended)
#define DEAD(who) ((who) == FIRST && killed_client && gone_client)
#define UNHELD (held == 0 || DEAD(held))

/* These are used inside a d_step. */
inline hold(who) {
    assert(UNHELD || held == who);
    held = who
}

inline hand(client) {
    assert(claim != c || client != LENT || !written);
    CAS(won, claim, c, HAND(c, client));
    c = (won -> claim : c)
}

/* A sequence is taken once; publishing keeps it. (Freeing what is free is what two sweeps do that overtake each other.) */
inline set_life(new) {
    assert(SEQUENCE(new) > SEQUENCE(life) || (SEQUENCE(new) == SEQUENCE(life) &&
           (LIFE_STATE(new) == LIFE_STATE(life) || (LIFE_STATE(new) == PUBLISHED && LIFE_STATE(life) == GRANTED))));
    life = new;
    written = false
}

inline swing(state, page) {
    CAS(won, word, w, NEXT(w, state, 0, page))
}

proctype reader() {
    short w, l, c;
    byte value;
    bool won, fit;
start:
    atomic { w = word; l = 0; c = 0; value = 0; won = false }
    if
    :: STATE(w) == CACHED ->
        l = life;
        if
        :: word != w -> goto start
        :: word == w
        fi;
        fit = (LIFE_STATE(l) == PUBLISHED && !key);
        if
        :: fit && OWNER(l) == ENTRY -> c = claim; fit = (CLAIMER(c) == LENT)
        :: !fit || OWNER(l) != ENTRY
        fi;
        if
        :: !fit -> d_step { swing(SPILLED, 0) } goto start
        :: fit
        fi;
        value = page_value;
        if
        :: SEQUENCE(life) != SEQUENCE(l) -> goto start
        :: SEQUENCE(life) == SEQUENCE(l)
        fi;
        if
        :: OWNER(l) == ENTRY && claim != c -> goto start
        :: OWNER(l) != ENTRY || claim == c
        fi;
        assert(value == VALUE)
    :: STATE(w) != CACHED       /* elsewhere */
    fi;
    d_step { fit = false; w = 0; l = 0; c = 0; value = 0; won = false }
}

/* The reclaim thread. */

inline look() {
    yields = taking;
    l = life;
    yields = yields || (LIFE_STATE(l) == BUFFER) || (OWNER(l) == ENTRY && CLAIMER(claim) != LENT)
}

inline promote(other) {
    atomic { moving = word; look() }
    if
    :: !yields && (other || STATE(moving) != CACHED) ->
        filling = true;                 /* @promote.announce */
        look();
        won = !yields;
        if
        :: won && LIFE_STATE(l) == PUBLISHED ->
            w = (key -> 0 : word);
            if
            :: NAMES(w, 0) -> d_step { swing(SPILLED, 0) }
            :: !NAMES(w, 0)
            fi;
            if
            :: won -> d_step { CAS(won, life, l, ADVANCE(l, FREE, OWNER(l))); l = life }
            :: !won
            fi
        :: !won || LIFE_STATE(l) != PUBLISHED           /* @promote.yield */
        fi;
        if
        :: won ->
            d_step { assert(UNHELD); CAS(won, life, l, ADVANCE(l, GRANTED, OWNER(l))); l = life }    /* @promote.grant */
        :: !won
        fi;
        if
        :: won ->
            d_step { assert(UNHELD); key = other }
            d_step { assert(UNHELD); page_value = (other -> OTHER : VALUE) }         /* @promote.copy */
            d_step { assert(life == l); set_life(KEPT_PUBLISHED(l)) }                   /* @promote.publish */
            if
            :: !other ->
                d_step { w = moving; swing(CACHED, 0) }         /* @promote.swing */
                if
                :: !won -> d_step { set_life(ADVANCE(l, FREE, OWNER(l))) }      /* @promote.drop */
                :: won
                fi
            :: other
            fi
        :: !won
        fi;
        filling = false                 /* @promote.done */
    :: yields || (!other && STATE(moving) == CACHED)
    fi;
    d_step { l = 0; w = 0; moving = 0; won = false; yields = false }
}

/* One that is stopped in its copy is another matter: a claimer gives up then (claim.yield). */
#define MAY_PROMOTE (ended < PROMOTERS)

inline promote_one() {
    if
    :: MAY_PROMOTE -> promote(false)
    :: MAY_PROMOTE -> promote(true)
    :: true         /* nobody may depend on its going on */
    fi
}

proctype reclaimer() {
    short w, l, moving;
    bool won, yields;
    {
        promote_one()
    } unless { killed };
    atomic { gone_reclaimer = true; l = 0; w = 0; moving = 0; won = false; yields = false }
}

/* Clients. */

#define WORTH_A_LOOK (CLAIMER(claim) == LENT || CLAIMER(claim) == BROKER || !reserved)

inline sweep(state, owner) {
    l = life;
    d_step { set_life(ADVANCE(l, state, owner)); l = 0 }
}

inline claim_use_lend(me) {
    do
    :: atomic { WORTH_A_LOOK -> c = claim }
        if
        :: !reserved -> break
        :: reserved
        fi;
        if
        :: CLAIMER(c) == LENT -> d_step { hand(me) }            /* @claim.word */
        :: CLAIMER(c) == BROKER ->
            if
            :: ENDED_BROKER ->
                d_step { hand(me); seized = won }               /* from a dead broker */
#ifndef FAULT_SEIZE_WITHOUT_STATE
                if
                :: seized && !reserved -> won = false; break    /* the second look */
                :: !seized || reserved
                fi
#endif
            :: claim != c || !reserved
            fi
        :: CLAIMER(c) != LENT && CLAIMER(c) != BROKER
        fi;
        if
        :: won -> break
        :: !won
        fi
    od;
    if
#ifdef FAULT_SEIZED_YIELDS
    :: won && (seized || filling) && !STOPS ->
#else
    :: won && !seized && filling && !STOPS ->
#endif
        d_step { hand(LENT) }           /* @claim.yield */
    :: won && (seized || !filling || ENDED_BROKER) ->           /* @claim.wait */
        d_step { hold(me); assert(OWNER(life) == ENTRY) }
        d_step { page_value = GUEST(me); written = true }
        assert(page_value == GUEST(me));
        sweep(FREE, ENTRY);             /* @lend.life */
        d_step { held = 0; hand(LENT); assert(won) }            /* @lend.word */
    :: !won
    fi;
    d_step { c = 0; l = 0; won = false; seized = false }
}

proctype mortal() {
    short l, c;
    bool won, seized;
    {
        claim_use_lend(FIRST)
    } unless { killed_client };
    atomic { gone_client = true; c = 0; l = 0; won = false; seized = false }
}

proctype holder() {
    short l, c;
    bool won, seized;
    claim_use_lend(SECOND);
    gone_holder = true
}

/* Whoever a buffer is allocated for; it outlives the broker. */
proctype renter() {
end_unserved:
    known[RENTED];
    d_step { hold(RENTER) }
    page_value = GUEST(RENTER);
    assert(page_value == GUEST(RENTER));
    assert(life == LIFE(SEQUENCE(life), BUFFER, RENTED));
    assert(page_value == GUEST(RENTER));
    d_step { held = 0; done_renting = true }
}

/* The control thread. */

inline take(state, owner) {
    taking = true;              /* @take.announce */
    !filling;                   /* @take.wait */
    d_step { hold(BROKER) }
    sweep(state, owner);        /* @take.life */
    d_step { held = 0 }
    taking = false              /* @take.done */
}

inline bury() {
    (gone_client || !CLIENT_DIES);
    c = claim;
    if
    :: DEAD(CLAIMER(c)) ->
        d_step { hand(BROKER); assert(won) }            /* @death.claim */
        !filling;
        d_step { hold(BROKER) }
        sweep(FREE, ENTRY);
        d_step { held = 0; hand(LENT); assert(won) }
    :: !DEAD(CLAIMER(c))
    fi
}

inline release() {
    do
    :: atomic { CLAIMER(claim) == LENT || CLAIMER(claim) == BROKER || DEAD(CLAIMER(claim)) -> c = claim }
        d_step { hand(BROKER) }         /* @release.word */
        if
        :: won -> break
        :: !won
        fi
    od;
#ifdef FAULT_RELEASE_STATE_LAST
    take(FREE, 0);
    reserved = false
#else
    /* The state first: whoever seizes this claim from a dead broker and finds its reservation has lives of its entry. */
    reserved = false;
    take(FREE, 0)                       /* @release.life */
#endif
}

inline rent() {
#ifdef FAULT_HOLDER_BEFORE_LIFE
    rented = true;
    known[RENTED] = true;
    take(BUFFER, RENTED)
#else
    rented = true;              /* the entry says so before its pages do */
    take(BUFFER, RENTED);
    known[RENTED] = true        /* and the holder comes last */
#endif
}

inline give() {
    take(FREE, 0);                      /* @give.life */
    rented = false
}

inline duty() {
    if
#ifdef FAULT_RELEASE_BEFORE_HOLDER
    :: RELEASES && reserved -> release(); known[ENTRY] = false
#else
    :: RELEASES && reserved -> known[ENTRY] = false; release()          /* the last holder, then the release */
#endif
    :: !RELEASES || !reserved
    fi;
    if
    :: RENTS && !rented && !done_renting -> rent()
    :: true             /* nobody asks, or not again */
    fi;
    if
    :: rented -> done_renting; known[RENTED] = false; give()
    :: !rented
    fi;
    if
    :: reserved -> bury()
    :: !reserved
    fi;
    d_step { c = 0; l = 0; won = false }
}

proctype controller() {
    short l, c;
    bool won;
    {
        duty()
    } unless { killed };
    atomic { gone_controller = true; c = 0; l = 0; won = false }
}

/* Who takes over. */

#define IN_ENTRY(l)  (OWNER(l) == ENTRY && reserved || OWNER(l) == RENTED && rented)
#define OWNER_NOW(l) (IN_ENTRY(l) -> OWNER(l) : 0)

/*
 * Page by page; what is right already keeps its cache. What the dead broker was filling goes whatever the claim word says: a claimer may
 * give up, and touches no life then; its sweep, should it overtake this, stores the same word or a later one. All else that was cut
 * off is in an entry that nobody holds, and swept when that is released.
 */
inline put_right() {
    l = life;
    if
#if defined(FAULT_RECOVER_PASSES_CLAIMED)
    :: LIFE_STATE(l) == GRANTED && (OWNER(l) != ENTRY || CLAIMER(claim) == LENT) ->
        d_step { CAS(won, life, l, ADVANCE(l, FREE, OWNER_NOW(l))) }
#elif !defined(FAULT_RECOVER_KEEPS_GRANT)
    :: LIFE_STATE(l) == GRANTED -> d_step { CAS(won, life, l, ADVANCE(l, FREE, OWNER_NOW(l))) }     /* @recover.range */
#endif
#ifndef FAULT_RECOVER_ANY_OWNER
    :: LIFE_STATE(l) != GRANTED && OWNER_NOW(l) != OWNER(l) -> d_step { assert(life == l); set_life(ADVANCE(l, FREE, 0)) }
#endif
    :: else
    fi;
    d_step { won = false; l = 0 }
}

/* What the dead broker had in its hands. */
#if defined(FAULT_RECOVER_KEEPS_CLAIM)
#define IN_HAND(c) false
#elif defined(FAULT_RECOVER_SEIZES_LENT)
#define IN_HAND(c) (CLAIMER(c) == BROKER || CLAIMER(c) == LENT)
#else
#define IN_HAND(c) (CLAIMER(c) == BROKER)
#endif

inline take_over() {
    /* Before the signature: a claimer that finds a living broker waits for the copy that `filling` tells of. */
#ifdef FAULT_RECOVER_SIGNS_FIRST
    signature = ended;
#endif
#ifndef FAULT_RECOVER_KEEPS_FILLING
    filling = false;                    /* @recover.filling */
#endif
#ifndef FAULT_RECOVER_KEEPS_TAKING
    taking = false;
#endif
    signature = ended;                  /* @recover.sign */
    put_right();
    c = claim;
    if
    :: reserved && IN_HAND(c) ->
#ifdef FAULT_RECOVER_WITHOUT_SEIZE
        won = true;
#else
        d_step { hand(BROKER) }         /* @recover.seize */
#endif
        if
        :: won ->
            d_step { hold(BROKER) }
#ifndef FAULT_RECOVER_LENDS_AS_IS
            sweep(FREE, ENTRY);
#endif
            d_step { held = 0; hand(LENT); assert(won) }
        :: !won                         /* a client has seized it first */
        fi
    :: !reserved || !IN_HAND(c)
    fi;
#ifndef FAULT_RECOVER_KEEPS_ENTRY
    if
    :: reserved && !known[ENTRY] -> release()       /* cut off: once more */
    :: rented && !known[RENTED] -> give()
    :: !(reserved && !known[ENTRY]) && !(rented && !known[RENTED])
    fi;
#endif
    d_step { c = 0; l = 0; won = false }
}

proctype successor() {
    short w, l, c, moving;
    bool won, yields;
    atomic { killed && gone_reclaimer && gone_controller -> ended++; held = (held == BROKER -> 0 : held) }
    do
    :: {
        take_over();
        duty();
        promote_one();
        break
       } unless { killed == ended + 1 || stopped };
       if
       :: stopped -> goto end_stopped
       :: !stopped
       fi;
       atomic { ended++; held = (held == BROKER -> 0 : held); l = 0; w = 0; c = 0; moving = 0; won = false; yields = false }
    od;
    (gone_client || !CLIENT_DIES) && (gone_holder || !HOLDS);
    assert(!filling && !taking && LIFE_STATE(life) != GRANTED && LIFE_STATE(life) != BUFFER);
    assert(reserved == known[ENTRY] && !rented && !known[RENTED]);
    assert(!reserved || (CLAIMER(claim) != BROKER && !DEAD(CLAIMER(claim))));
    assert(OWNER(life) == (reserved -> ENTRY : 0));
end_stopped:
    skip
}

init {
    d_step {
        life = LIFE(0, PUBLISHED, SCENE(ENTRY, ENTRY, ENTRY, 0, ENTRY));
        word = WORD(0, CACHED, 0, 0);
        page_value = VALUE;
        reserved = SCENE(true, true, true, false, true);
        known[ENTRY] = reserved
    }
    atomic {
        run reclaimer();
        run controller();
        run successor();
        if
        :: LOADS -> run reader()
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
        :: RENTS -> run renter()
        :: else
        fi
    }
    do
    :: killed < DEATHS -> killed++
    :: CLIENT_DIES && !killed_client -> killed_client = true
    :: STOPS && killed && !stopped -> stopped = true
    :: killed -> break
    od
}
