/*
 * A load against all that can happen to the page that it reads: eviction, promotion, overwriting, invalidation, and a contiguous
 * allocation that takes the page, fills it with a guest's bytes and gives it back to the cache.
 *
 * Page AREA is the area; the other two are the nursery. At first slot 0 is in page 0 and slot 1 in page 1, both clean. One
 * client loads slot 0, and puts it back into the nursery if it had to read the file (refault). Another stores to slot 0, making
 * room by direct reclaim, or invalidates it. The broker's reclaim thread cleans, evicts and promotes as it likes. The control
 * thread allocates the area, writes, checks, frees. Either client may stop for ever at any step.
 *
 * Shows: what a load returns is whole and was the slot's latest value at some moment between its start and its end; it is never
 * a guest's byte nor another slot's; no value is lost; nothing but its holder writes a buffer; and the allocation ends even if
 * every client has stopped (who waits for a client hangs, and the verifier reports it as an invalid end state).
 *
 * Bounds: two slots, two nursery pages, one area page, one load, one store or invalidation, one allocation; not all at once,
 * but in scenes:
 *   SCENE_STORE  a load against a store or an invalidation
 *   SCENE_TAKE   a load against an allocation; the loader may stop
 *   SCENE_STOP   a store or an invalidation against an allocation; the storer may stop
 *   SCENE_ALL    all three, nobody stops; too large for every run, see docs/model.md
 * Abstracted: copying one half of a page is one step; so is looking at what a page holds (reclaim.pml); the claim of the side word
 * (store_clean.pml; only the reclaim thread cleans here); the type's life (type_life.pml); store buffers (claim.pml).
 */
#include "common.pml"

#define PAGES   3
#define AREA    2
#define SLOTS   2
#define NOTHING 0       /* the latest "value" of an invalidated slot */
#define OTHER   3       /* what slot 1 holds */
#define GUEST   4

#if defined(SCENE_STORE)
#define LOADS  true
#define STORES true
#define TAKES  false
#define STOPS  false
#elif defined(SCENE_TAKE)
#define LOADS  true
#define STORES false
#define TAKES  true
#define STOPS  true
#elif defined(SCENE_STOP)
#define LOADS  false
#define STORES true
#define TAKES  true
#define STOPS  true
#elif defined(SCENE_ALL)
#define LOADS  true
#define STORES true
#define TAKES  true
#define STOPS  false
#endif

#define LOADER  1
#define STORER  2
#define BROKER  3

short word[SLOTS];
short side;             /* of slot 0 */
short life[PAGES];
byte  key[PAGES];
byte  page_first[PAGES], page_second[PAGES];
byte  file_first, file_second;  /* of slot 0 */
bool  filling, taking;  /* there is but one area page */
#ifdef FAULT_READERS_PIN
bool  pinned;
#endif

bool  stopped[3];       /* that client takes no more steps, and nobody notices */

byte  latest;           /* ghost: what the last change of slot 0 stored */
byte  seen;             /* ghost: every value that was the latest since the load began, one bit each */

/* Holds after every step that changes a word, a life of the nursery, or the file. */
inline check() {
    assert(STATE(word[0]) != CACHED || PAGE(word[0]) == AREA ||
           (IN_USE(life[PAGE(word[0])]) && key[PAGE(word[0])] == 0 &&
            page_first[PAGE(word[0])] == latest && page_second[PAGE(word[0])] == latest));
    assert(!IS_DIRTY(word[0]) || PAGE(word[0]) != AREA);
    assert(!(IS_CLEAN(word[0]) || STATE(word[0]) == SPILLED) ||
           (file_first == latest && file_second == latest && CRC(side) == CRC_OF(latest, latest)))
}

/* To be used in the d_step of a change that stores a new value, or none, in slot 0. */
inline now_latest(stored) {
    latest = (won -> stored : latest);
    seen = seen | (1 << latest);
    check()
}

/* Evicts the clean page, or frees the orphan, that life l, key k and word w describe. */
inline discard(page) {
    won = true;
    if
    :: NAMES(w, page) -> d_step { CAS(won, word[k], w, NEXT(w, SPILLED, 0, 0)); check() }   /* @evict.word */
    :: else
    fi;
    if
    :: won -> d_step { CAS(won, life[page], l, ADVANCE(l, FREE, 0)); check() }      /* @evict.free */ /* @orphan.free */
    :: else
    fi
}

/* What a page holds. One step here, for who reads life, key, word and finds the same life again has read them as of one moment. */
inline look(page) {
    d_step { l = life[page]; k = key[page]; w = word[k]; known = (LIFE_STATE(l) == PUBLISHED) }
}

proctype loader() {
    short w, l;
    byte crc, first, second, own;
    bool won, fit;
    {
        seen = 1 << latest;
start:
        atomic { w = word[0]; l = 0; first = 0; second = 0; crc = 0; fit = false; won = false }    /* @load.word */
        if
        :: STATE(w) == EMPTY -> first = NOTHING; second = NOTHING
        :: STATE(w) == CACHED ->
            l = life[PAGE(w)];          /* @load.life */
#ifdef FAULT_READERS_PIN
            pinned = (PAGE(w) == AREA);
#endif
#ifndef FAULT_LOAD_WITHOUT_AGAIN
            if
            :: word[0] != w -> goto start
            :: word[0] == w                 /* @load.again */
            fi;
#endif
            fit = (LIFE_STATE(l) == PUBLISHED || (LIFE_STATE(l) == GRANTED && PAGE(w) != AREA));
#ifdef FAULT_LOAD_REFUSES_GRANTED
            fit = (LIFE_STATE(l) == PUBLISHED);
#endif
#ifdef FAULT_LOAD_ANY_STATE
            fit = true;
#endif
#ifndef FAULT_LOAD_ANY_KEY
            fit = fit && key[PAGE(w)] == 0;
#endif
            if
            :: !fit ->
                d_step { CAS(won, word[0], w, NEXT(w, SPILLED, 0, 0)); check() }    /* @load.heal */
                goto start
            :: else
            fi;
            first = page_first[PAGE(w)];    /* @load.copy */
            second = page_second[PAGE(w)];
#ifndef FAULT_LOAD_WITHOUT_RECHECK
            if
            :: SEQUENCE(life[PAGE(w)]) != SEQUENCE(l) -> goto start
            :: SEQUENCE(life[PAGE(w)]) == SEQUENCE(l)       /* @load.recheck */
            fi
#endif
        :: STATE(w) == SPILLED ->
            crc = CRC(side);            /* @load.file */
            first = file_first;
            second = file_second;
#ifndef FAULT_LOAD_WITHOUT_FILE_AGAIN
            if
            :: word[0] != w -> goto start
            :: word[0] == w             /* @load.file_again */
            fi;
#endif
            assert(CRC_OF(first, second) == crc);
            if
            :: LIFE_STATE(life[0]) == FREE || LIFE_STATE(life[1]) == FREE ->
                atomic {
                    if
                    :: LIFE_STATE(life[0]) == FREE -> own = 0
                    :: LIFE_STATE(life[1]) == FREE -> own = 1
                    :: else -> goto loaded
                    fi;
                    life[own] = ADVANCE(life[own], GRANTED, LOADER)     /* @load.refault */
                }
                key[own] = 0;
                page_first[own] = first;
                page_second[own] = second;
                d_step {
#ifdef FAULT_REFAULT_ANY_WORD
                    w = word[0];
#endif
                    CAS(won, word[0], w, NEXT(w, CACHED, 0, own));
                    check()
                }
                life[own] = (won -> PUBLISH(life[own]) : ADVANCE(life[own], FREE, 0))
            :: skip
            fi
        fi;
loaded:
#ifdef FAULT_READERS_PIN
        pinned = false;
#endif
        assert(first == second);
        assert(seen & (1 << first))
    } unless { stopped[LOADER] }
}

proctype storer() {
    short w, l;
    byte k, own;
    bool won, known;
    {
        if
        :: do
            :: atomic {
                if
                :: LIFE_STATE(life[0]) == FREE -> own = 0
                :: LIFE_STATE(life[1]) == FREE -> own = 1
                fi;
                life[own] = ADVANCE(life[own], GRANTED, STORER);    /* @store.grant */
                check()
               }
               break
            :: look(0); if :: known -> discard(0) :: else fi
            :: look(1); if :: known -> discard(1) :: else fi
            od;
            key[own] = 0;       /* @store.fill */
            page_first[own] = 2;
            page_second[own] = 2;
            won = false;
            do
            :: !won ->
                w = word[0];
                d_step { CAS(won, word[0], w, NEXT(w, CACHED, 1, own)); now_latest(2) }     /* @store.swing */
            :: else -> break
            od;
            life[own] = PUBLISH(life[own])      /* @store.publish */
        :: do
            :: !won ->
                w = word[0];
                d_step { CAS(won, word[0], w, NEXT(w, EMPTY, 0, 0)); now_latest(NOTHING) }  /* @invalidate.swing */
            :: else -> break
            od
        fi
    } unless { stopped[STORER] }
}

/* The broker's reclaim thread. */

inline clean(page) {
    d_step { file_first = page_first[page]; check() }   /* @clean.write */
    d_step { file_second = page_second[page]; check() }
    d_step { side = SIDE(0, CRC_OF(file_first, file_second)); check() }     /* @clean.crc */
    d_step { CAS(won, word[k], w, NEXT(w, CACHED, 0, page)); check() }      /* @clean.dirty_off */
}

inline promote(page) {
    moving = w;
    place = k;
    from = l;
    filling = true;     /* @promote.announce */
#ifdef FAULT_PROMOTE_IGNORES_TAKING
    if
    :: skip ->
#else
    if
    :: taking       /* @promote.yield */
    :: !taking ->
#endif
        look(AREA);
        if
        :: known -> discard(AREA)
        :: else
        fi;
        if
        :: LIFE_STATE(life[AREA]) == FREE ->
            life[AREA] = ADVANCE(life[AREA], GRANTED, BROKER);      /* @promote.grant */
            key[AREA] = place;
            page_first[AREA] = page_first[page];                    /* @promote.copy */
            page_second[AREA] = page_second[page];
            life[AREA] = PUBLISH(life[AREA]);                       /* @promote.publish */
            d_step {
#ifdef FAULT_PROMOTE_ANY_VERSION
                moving = (NAMES(word[place], page) -> word[place] : moving);
#endif
                CAS(won, word[place], moving, NEXT(moving, CACHED, 0, AREA));  /* @promote.swing */
                check()
            }
            if
            :: won -> d_step { CAS(won, life[page], from, ADVANCE(from, FREE, 0)); check() }
            :: else -> life[AREA] = ADVANCE(life[AREA], FREE, 0)    /* @promote.drop */
            fi
        :: else
        fi
    fi;
    filling = false     /* @promote.done */
}

inline sweep(page) {
    look(page);
    if
    :: known && IS_DIRTY(w) && NAMES(w, page) -> clean(page)
    :: known && IS_CLEAN(w) && NAMES(w, page) -> promote(page)
    :: known && !IS_DIRTY(w) -> discard(page)
    :: else
    fi;
    d_step { l = 0; k = 0; w = 0; moving = 0; place = 0; from = 0; known = false; won = false }
}

proctype reclaimer() {
    short w, l, moving, from;
    byte k, place;
    bool won, known;
    do
    :: sweep(0)
    :: sweep(1)
    :: break    /* nobody may depend on its going on */
    od
}

/* The broker's control thread, and the guest. */
proctype controller() {
    taking = true;      /* @take.announce */
#ifdef FAULT_READERS_PIN
    !pinned;
#endif
#ifndef FAULT_TAKE_IGNORES_FILLING
    !filling;           /* @take.wait */
#endif
    life[AREA] = ADVANCE(life[AREA], BUFFER, BROKER);   /* @take.life */
    taking = false;     /* @take.done */
    page_first[AREA] = GUEST;
    page_second[AREA] = GUEST;
    assert(page_first[AREA] == GUEST);
    assert(page_second[AREA] == GUEST);
    life[AREA] = ADVANCE(life[AREA], FREE, 0)           /* @give.life */
}

init {
    d_step {
        life[0] = LIFE(0, PUBLISHED, 0);
        life[1] = LIFE(0, PUBLISHED, 0);
        key[1] = 1;
        word[0] = WORD(0, CACHED, 0, 0);
        word[1] = WORD(0, CACHED, 0, 1);
        page_first[0] = 1; page_second[0] = 1; file_first = 1; file_second = 1; side = SIDE(0, CRC_OF(1, 1)); latest = 1;
        page_first[1] = OTHER; page_second[1] = OTHER
    }
    atomic {
        run reclaimer();
        if
        :: LOADS -> run loader()
        :: !LOADS
        fi;
        if
        :: STORES -> run storer()
        :: !STORES
        fi;
        if
        :: TAKES -> run controller()
        :: !TAKES
        fi
    }
    if
    :: STOPS && LOADS -> stopped[LOADER] = true
    :: STOPS && STORES -> stopped[STORER] = true
    :: true
    fi
}
