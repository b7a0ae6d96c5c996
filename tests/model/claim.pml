/*
 * Who writes an area page: the broker's reclaim thread, which fills it with a promoted page; the client that claims the
 * reservation it lies in; or the broker's control thread, which takes it for an allocation. Each says what it is about to do and
 * then looks at what the others have said (Dekker's way), on a machine with store buffers.
 *
 * Page 0 lies in a reservation that a client claims, page 1 in a range that the control thread takes. The reclaim thread promotes
 * into either, again and again. The client may stop for ever at any step, and the broker may be killed at any step.
 *
 * Every plain store goes into the one-entry store buffer of its process and reaches memory at any later time (a second store
 * waits until then); a process sees its own buffered store; a full fence waits until the buffer is empty. That is x86-TSO with the
 * shortest buffer. A compare-and-swap is a store and a fence here, so that its fence can be left out. A killed process takes no step
 * any more, but what it stored arrives still; it has ended when that is over.
 *
 * Shows: the claimer's and the taker's bytes are not written by the broker, nor by what is left of it; what both wait for is one
 * page's copy. With -DPROGRESS and the formula below: the waits end, though the reclaim thread never rests, because it looks
 * before it announces, and does not announce a page that is claimed or taken already; and though the broker is killed.
 *
 * Bounds: two area pages of two halves, one claim, one take, promotions without end, one buffered store a process.
 * Abstracted: what is promoted and which word names it (load.pml); the sequence of life, lending again (reserve.pml).
 */
#include "common.pml"

#define RECLAIMER 0
#define CLIENT    1
#define CONTROL   2
#define PROCESSES 3

/* memory, one byte an address; address 0 stands for "none" */
#define FILLING     1
#define CLAIM       2
#define TAKING      3
#define LIFE_OF(page)   (4 + (page))
#define FIRST_OF(page)  (6 + (page))
#define SECOND_OF(page) (8 + (page))
#define ADDRESSES   10

#define CACHE 1     /* a promoted page's bytes */
#define GUEST 2

byte memory[ADDRESSES];
byte buffered_at[PROCESSES], buffered[PROCESSES];   /* the store buffers */

bool stopped;       /* the client takes no more steps */
bool killed_broker, gone_reclaimer, gone_control;
bool client_served, control_served;

#define READ(process, address) \
    (buffered_at[process] == (address) -> buffered[process] : memory[address])

#define EMPTY_BUFFER(process) (buffered_at[process] == 0)

inline write(process, address, stored) {
    d_step { EMPTY_BUFFER(process) -> buffered_at[process] = address; buffered[process] = stored }
}

inline full_fence(process) {
    EMPTY_BUFFER(process)
}

/* What the client sees when it asks the kernel whether the process has ended. */
#ifdef FAULT_TAKE_OVER_BEFORE_END
#define ENDED_BROKER killed_broker
#else
#define ENDED_BROKER (killed_broker && gone_reclaimer && gone_control && EMPTY_BUFFER(RECLAIMER) && EMPTY_BUFFER(CONTROL))
#endif

/* Ends when no promotion into the page is under way, or none will go on. Looks again and again, as a spinning thread does. */
inline wait_for(process, page) {
    do
    :: READ(process, FILLING) == page + 1 && !ENDED_BROKER
    :: READ(process, FILLING) != page + 1 || ENDED_BROKER -> break
    od
}

/* The holder of a buffer writes it, and finds its bytes there. */
inline use(process, page) {
    write(process, FIRST_OF(page), GUEST);
    write(process, SECOND_OF(page), GUEST);
    full_fence(process);
    assert(memory[FIRST_OF(page)] == GUEST);
    assert(memory[SECOND_OF(page)] == GUEST)
}

/* The first processes, so that the store buffer of process n is drained by process number n. */
active [PROCESSES] proctype store_buffer() {
end_drained:
    do
    :: d_step {
        !EMPTY_BUFFER(_pid) ->
            memory[buffered_at[_pid]] = buffered[_pid];
            buffered_at[_pid] = 0;
            buffered[_pid] = 0
       }
    od
}

#if defined(FAULT_PROMOTE_IGNORES_CLAIM)
#define CLAIMED(page) false
#else
#define CLAIMED(page) ((page) == 0 && READ(RECLAIMER, CLAIM) != 0)
#endif
#if defined(FAULT_PROMOTE_IGNORES_TAKING)
#define TAKEN(page) false
#else
#define TAKEN(page) (READ(RECLAIMER, TAKING) == (page) + 1)
#endif
#define HOLDS_BUFFER(page) (READ(RECLAIMER, LIFE_OF(page)) == BUFFER)

/* In this order: a range that is not being taken any more shows in life, whose owner tells where to look for the claim. */
inline look(page) {
#ifdef FAULT_PROMOTE_LIFE_BEFORE_TAKING
    yields = HOLDS_BUFFER(page);
    yields = yields || TAKEN(page);
#else
    yields = TAKEN(page);
#ifdef FAULT_PROMOTE_LIFE_BEFORE_FENCE
    yields = yields || (!announced && HOLDS_BUFFER(page));
#else
    yields = yields || HOLDS_BUFFER(page);
#endif
#endif
    yields = yields || CLAIMED(page)
}

inline promote(page) {
#ifndef FAULT_ANNOUNCE_WITHOUT_LOOKING
    look(page);
#endif
    if
    :: !yields ->
        write(RECLAIMER, FILLING, page + 1);    /* @promote.announce */
        announced = true;
#ifndef FAULT_ANNOUNCE_WITHOUT_FENCE
        full_fence(RECLAIMER);
#endif
        look(page);
        if
        :: yields                               /* @promote.yield */
        :: !yields ->
            write(RECLAIMER, LIFE_OF(page), GRANTED);       /* @promote.grant */
            write(RECLAIMER, FIRST_OF(page), CACHE);        /* @promote.copy */
            write(RECLAIMER, SECOND_OF(page), CACHE);
            write(RECLAIMER, LIFE_OF(page), PUBLISHED)      /* @promote.publish */
        fi;
        write(RECLAIMER, FILLING, 0)            /* @promote.done */
    :: yields
    fi;
    atomic { yields = false; announced = false }
}

active proctype reclaimer() {
    bool yields, announced;
    {
end_served:
        do
        :: promote(0)
        :: promote(1)
        od
    } unless { killed_broker };
    atomic { gone_reclaimer = true; yields = false; announced = false }
}

active proctype client() {
    {
        write(CLIENT, CLAIM, 1);                /* @claim.word */
#ifndef FAULT_CLAIM_WITHOUT_FENCE
        full_fence(CLIENT);
#endif
#ifndef FAULT_CLAIM_IGNORES_FILLING
        wait_for(CLIENT, 0);                    /* @claim.wait */
#endif
        use(CLIENT, 0);
        client_served = true
    } unless { stopped }
}

active proctype control() {
    {
        write(CONTROL, TAKING, 2);              /* @take.announce */
#ifndef FAULT_TAKE_WITHOUT_FENCE
        full_fence(CONTROL);
#endif
#ifndef FAULT_TAKE_IGNORES_FILLING
        wait_for(CONTROL, 1);                   /* @take.wait */
#endif
        write(CONTROL, LIFE_OF(1), BUFFER);     /* @take.life */
        full_fence(CONTROL);
        write(CONTROL, TAKING, 0);              /* @take.done */
        use(CONTROL, 1);
        control_served = true
    } unless { killed_broker };
    gone_control = true
}

active proctype stopper() {
    if
    :: stopped = true
    :: skip
    fi;
    if
    :: killed_broker = true
    :: skip
    fi
}

#ifdef PROGRESS
ltl waits_end { <> (control_served || killed_broker) && <> (client_served || stopped) }
#endif
