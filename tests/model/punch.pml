/*
 * One slot and its place in the spill file: it is stored to, cleaned, evicted, loaded and invalidated, while the broker gives back the disk
 * space of a place that no value needs.
 *
 * Client 1 stores a value and has it written through. Client 2 does one of: a store left behind, a store of zeros, of a pattern, an
 * invalidation. The broker cleans, evicts and punches, each as often as there is something to do.
 *
 * Shows: the file of a clean or SPILLED value is that value, and its checksum; a load returns a whole value that was the latest while it
 * looked, or that there is none; the file holds nothing where no value is in it, unless the word says LAID or somebody is writing there; no
 * claim outlives its holder's death for good; and in the end, whoever died where, what is not needed has been given back.
 *
 * Bounds: one slot, one operation of each client; in scenes:
 *   SCENE_LOAD   client 3 loads; what client 1 stores is left to the broker to clean
 *   SCENE_AGAIN  client 3 invalidates, whatever the others have done; likewise
 *   SCENE_DEATH  client 1, or the broker in a punch, is killed at any step; their claims are taken over by whoever needs the place
 * Abstracted: pages (a CACHED word has its value where the page's number is; store_clean.pml shows that they are the same), the end of a
 * type's life (type_life.pml: a punch looks at it where a cleaning does).
 */
#include "common.pml"

#if defined(SCENE_LOAD)
#define SCENE(load, again, death) load
#elif defined(SCENE_AGAIN)
#define SCENE(load, again, death) again
#elif defined(SCENE_DEATH)
#define SCENE(load, again, death) death
#endif
#define LOADS   SCENE(1, 0, 0)
#define AGAIN   SCENE(0, 1, 0)
#define DIES    SCENE(0, 0, 1)
#define CLIENTS (2 + LOADS + AGAIN)

#define PUNCHER 5
#define SUCCESSOR 6
#define CLEANER 7
#define OLD 3           /* the value that the slot has at first, in the file alone */
#define HOLE 0          /* of a place in the file; in `latest`: no value, or zeros */

#define VALUE(w) PAGE(w)
#define FILLED_LAID 6   /* its payload is a pattern, which leaves LAID no room: a state of its own */
#define LAID(w)  (STATE(w) == FILLED_LAID || (STATE(w) != FILLED && PAGE(w)))     /* of a word that is hollow */
#define HOLLOW(w) (STATE(w) == EMPTY || STATE(w) == ZERO || STATE(w) >= FILLED)
#define IS_FILLED(w) (STATE(w) >= FILLED)
#ifdef FAULT_PUNCH_DROPS_PATTERN
#define PUNCHED(w) NEXT(w, (IS_FILLED(w) -> FILLED : STATE(w)), 0, 0)
#else
#define PUNCHED(w) NEXT(w, (IS_FILLED(w) -> FILLED : STATE(w)), 0, (IS_FILLED(w) -> PAGE(w) : 0))
#endif
#ifdef FAULT_SWING_FORGETS
#define LEFT_BEHIND(w) (HOLLOW(w) && LAID(w))
#else
#define LEFT_BEHIND(w) (!HOLLOW(w) || LAID(w))
#endif

#define AS_LAID(state, w) (state == FILLED && LEFT_BEHIND(w) -> FILLED_LAID : state)

short word = WORD(0, SPILLED, 0, 0);
short side = SIDE(0, CRC_OF(OLD, OLD));
byte  file_first = OLD, file_second = OLD;

byte  killed_worker, killed_puncher;    /* the process whose next step is not taken */
bool  dead[8];          /* its lock on its record has gone */
byte  gone;             /* workers that have ended */

byte  latest = OLD;     /* ghost: what the last change of the slot stored */
bool  was[4];           /* ghost: what the slot's value has been since the load began */

#define FREE_PLACE (WRITER_OF(side) == 0 || dead[CLIENT_OF(side)])

/* Holds after every step that changes the word, the side word or the file. */
inline check() {
    was[latest] = was[latest] || LOADS;
    assert(STATE(word) != CACHED || VALUE(word) == latest);
    assert(!HOLLOW(word) || latest == (IS_FILLED(word) -> VALUE(word) : HOLE));
    assert(!(IS_CLEAN(word) || STATE(word) == SPILLED) || (file_first == latest && file_second == latest && CRC(side) == CRC_OF(latest, latest)));
    assert(!HOLLOW(word) || LAID(word) || WRITER_OF(side) != 0 || (file_first == HOLE && file_second == HOLE))
}

inline swing(state, dirty, stored) {
    won = false;
    do
    :: !won ->
        w = word;
        d_step {
            CAS(won, word, w, NEXT(w, AS_LAID(state, w), dirty, (state == CACHED || state == FILLED -> stored : LEFT_BEHIND(w))));    /* @store.swing */ /* @store.filled */ /* @invalidate.swing */
            w = (won -> word : w);
            latest = (won -> stored : latest);
            check()
        }
    :: won -> break
    od
}

/* A claim of the place, from nobody or from the dead. */
inline claim(me) {
    c = side;
    d_step {
        mine = SIDE(WRITER(me, 0), CRC(c));
        won = (side == c && (WRITER_OF(c) == 0 || dead[CLIENT_OF(c)]));
        side = (won -> mine : side);            /* @clean.claim */ /* @punch.claim */
        check()
    }
}

inline release() {
    d_step { CAS(won, side, mine, SIDE(0, CRC(mine))); check() }        /* @clean.release */ /* @punch.release */
}

inline clean(me) {
    claim(me);
    if
    :: won ->
        at = word;                              /* @clean.read */
        if
        :: IS_DIRTY(at) ->
            d_step { file_first = VALUE(at); check() }                  /* @clean.write */
            d_step { file_second = VALUE(at); check() }
            d_step { CAS(won, side, mine, SIDE(WRITER_OF(mine), CRC_OF(VALUE(at), VALUE(at)))); mine = (won -> side : mine); check() }      /* @clean.crc */
            d_step { CAS(won, word, at, NEXT(at, CACHED, 0, VALUE(at))); check() }      /* @clean.dirty_off */
        :: !IS_DIRTY(at)
        fi;
        release()
    :: !won
    fi;
    d_step { won = false; c = 0; mine = 0; at = 0 }
}

/* Called where the word was seen to be hollow and laid. */
inline punch(me) {
    at = word;
#ifdef FAULT_PUNCH_WITHOUT_CLAIM
    d_step { mine = side; won = true }
#else
    claim(me);
#endif
    if
    :: won ->
#ifndef FAULT_PUNCH_WITHOUT_AGAIN
        at = word;                              /* @punch.again */
#endif
        if
        :: HOLLOW(at) && LAID(at) ->
#ifdef FAULT_MARK_BEFORE_PUNCH
            d_step { CAS(won, word, at, PUNCHED(at)); check() }
#endif
            d_step { file_first = HOLE; check() }                       /* @punch.hole */
            d_step { file_second = HOLE; check() }
#ifndef FAULT_MARK_BEFORE_PUNCH
            d_step {
#ifdef FAULT_MARK_ANY_WORD
                at = word;
                word = (HOLLOW(at) -> PUNCHED(at) : NEXT(at, EMPTY, 0, 0));
#else
                CAS(won, word, at, PUNCHED(at));          /* @punch.word */
#endif
                check()
            }
#endif
        :: !(HOLLOW(at) && LAID(at))
        fi;
#ifndef FAULT_PUNCH_WITHOUT_CLAIM
        release()
#endif
    :: !won
    fi;
    d_step { won = false; c = 0; mine = 0; at = 0 }
}

proctype worker(byte me) {
    short w, c, mine, at;
    bool won;
    {
        if
        :: me == 1 ->
            swing(CACHED, 1, 1);
            do
            :: word != w || !DIES -> break
            :: word == w && FREE_PLACE && DIES -> clean(1)
            od
        :: me == 2 -> swing(CACHED, 1, 2)
        :: me == 2 -> swing(ZERO, 0, HOLE)
        :: me == 2 -> swing(FILLED, 0, 2)
        :: me > 1 -> swing(EMPTY, 0, HOLE)
        fi
    } unless { killed_worker == me };
    atomic { dead[me] = (killed_worker == me); gone++ }
}

proctype loader() {
    short w, s;
    byte first, second;
    bool read;
    d_step { was[0] = false; was[1] = false; was[2] = false; was[3] = false; was[latest] = true }
    do
    :: w = word;
        if
        :: STATE(w) == SPILLED ->
            s = side;
            first = file_first;                 /* @load.file */
            second = file_second;
#ifdef FAULT_LOAD_WITHOUT_FILE_AGAIN
            assert(CRC(s) == CRC_OF(first, second));
            break
#else
            if
            :: word == w -> assert(CRC(s) == CRC_OF(first, second)); assert(was[first]); break     /* @load.file_again */
            :: word != w
            fi
#endif
        :: HOLLOW(w) -> assert(was[(IS_FILLED(w) -> VALUE(w) : HOLE)]); break
        :: STATE(w) == CACHED -> assert(was[VALUE(w)]); break
        fi
    od;
    gone++
}

#define NEEDS (HOLLOW(word) && LAID(word))

proctype puncher() {
    short c, mine, at;
    bool won;
    {
        do
        :: NEEDS && FREE_PLACE -> punch(PUNCHER)
        :: gone == CLIENTS && !NEEDS -> break
        od
    } unless { killed_puncher == PUNCHER };
    if
    :: killed_puncher == PUNCHER ->
        dead[PUNCHER] = true;
        do
        :: NEEDS && FREE_PLACE -> punch(SUCCESSOR)
        :: gone == CLIENTS && !NEEDS -> break
        od
    :: killed_puncher != PUNCHER
    fi;
    gone++
}

proctype death() {
    if
    :: killed_worker = 1
    :: killed_puncher = PUNCHER
    :: skip
    fi
}

/* Cleans and evicts; and at the end the judge: it stops where nothing is left to do, or hangs on what was left behind. */
active proctype sweeper() {
    short c, mine, at;
    bool won;
    atomic {
        run worker(1);
        run worker(2);
        if
        :: LOADS -> run loader()
        :: AGAIN -> run worker(3)
        :: DIES -> run death()
        fi;
        run puncher()
    }
    do
    :: IS_DIRTY(word) && FREE_PLACE -> clean(CLEANER)
    :: IS_CLEAN(word) -> at = word; d_step { CAS(won, word, at, (IS_CLEAN(at) -> NEXT(at, SPILLED, 0, 0) : at)); check() }      /* @evict.word */
    :: gone == CLIENTS + 1 && !IS_DIRTY(word) && !IS_CLEAN(word) -> break
    od;
    assert(FREE_PLACE);
    assert(!HOLLOW(word) || (file_first == HOLE && file_second == HOLE));
    check()
}
