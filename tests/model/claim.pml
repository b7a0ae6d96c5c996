/*
 * Who changes an area page: the broker's reclaim thread, which fills it with a promoted page; the client that claims the
 * reservation it lies in; or the broker's control thread, which takes it for an allocation. Each says what it is about to do and
 * then looks at what the others have said (Dekker's way), on a machine with store buffers.
 *
 * Page 0 lies in a reservation that a client claims, page 1 in a range that the control thread takes. The reclaim thread promotes
 * into either, again and again. The client may stop for ever at any step.
 *
 * Every plain store goes into the one-entry store buffer of its process and reaches memory at any later time (a second store
 * waits until then); a process sees its own buffered store; a full fence waits until the buffer is empty. That is x86-TSO with the
 * shortest buffer. A compare-and-swap is a store and a fence here, so that its fence can be left out.
 *
 * Shows: the claimer's and the taker's bytes are not written by the broker; what both wait for is one page's copy.
 * With -DPROGRESS and the formula below: the waits end, though the reclaim thread never rests, because it looks before
 * it announces, and does not announce a page that is claimed or taken already.
 *
 * Bounds: two area pages of two halves, one claim, one take, promotions without end, one buffered store a process.
 * Abstracted: what is promoted and which word names it (load.pml); the sequence of life.
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

#define LENT  1     /* a promoted page's bytes */
#define GUEST 2

byte memory[ADDRESSES];
byte buffered_at[PROCESSES], buffered[PROCESSES];   /* the store buffers */

bool stopped;       /* the client takes no more steps */
bool client_gone, client_served, control_served;

#define READ(process, address) \
    (buffered_at[process] == (address) -> buffered[process] : memory[address])

#define EMPTY_BUFFER(process) (buffered_at[process] == 0)

inline write(process, address, stored) {
    d_step { EMPTY_BUFFER(process) -> buffered_at[process] = address; buffered[process] = stored }
}

inline full_fence(process) {
    EMPTY_BUFFER(process)
}

/* Ends when no promotion into the page is under way. Looks again and again, as a spinning thread does. */
inline wait_for(process, page) {
    do
    :: READ(process, FILLING) == page + 1
    :: READ(process, FILLING) != page + 1 -> break
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

inline spoken_for(page) {
#if defined(FAULT_PROMOTE_IGNORES_CLAIM)
    yields = (page == 1 && READ(RECLAIMER, TAKING) == page + 1)
#elif defined(FAULT_PROMOTE_IGNORES_TAKING)
    yields = (page == 0 && READ(RECLAIMER, CLAIM) != 0)
#else
    yields = (page == 0 -> READ(RECLAIMER, CLAIM) != 0 : READ(RECLAIMER, TAKING) == page + 1)
#endif
}

inline promote(page) {
#ifndef FAULT_ANNOUNCE_WITHOUT_LOOKING
    spoken_for(page);
#endif
    if
    :: !yields ->
        write(RECLAIMER, FILLING, page + 1);    /* @promote.announce */
#ifndef FAULT_ANNOUNCE_WITHOUT_FENCE
        full_fence(RECLAIMER);
#endif
        spoken_for(page);
        if
        :: yields                               /* @promote.yield */
        :: !yields ->
#ifndef FAULT_PROMOTE_IGNORES_LIFE
            yields = (READ(RECLAIMER, LIFE_OF(page)) == BUFFER);
#endif
            if
            :: yields
            :: !yields ->
                write(RECLAIMER, LIFE_OF(page), GRANTED);       /* @promote.grant */
                write(RECLAIMER, FIRST_OF(page), LENT);         /* @promote.copy */
                write(RECLAIMER, SECOND_OF(page), LENT);
                write(RECLAIMER, LIFE_OF(page), PUBLISHED)      /* @promote.publish */
            fi
        fi;
        write(RECLAIMER, FILLING, 0)            /* @promote.done */
    :: yields
    fi;
    yields = false
}

active proctype reclaimer() {
    bool yields;
end_served:
    do
    :: promote(0)
    :: promote(1)
    od
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
        write(CLIENT, LIFE_OF(0), BUFFER);      /* @claim.life */
        full_fence(CLIENT);
        use(CLIENT, 0);
        client_served = true
    } unless { stopped }
}

active proctype control() {
    write(CONTROL, TAKING, 2);                  /* @take.announce */
#ifndef FAULT_TAKE_WITHOUT_FENCE
    full_fence(CONTROL);
#endif
#ifndef FAULT_TAKE_IGNORES_FILLING
    wait_for(CONTROL, 1);                       /* @take.wait */
#endif
    write(CONTROL, LIFE_OF(1), BUFFER);         /* @take.life */
    full_fence(CONTROL);
    write(CONTROL, TAKING, 0);                  /* @take.done */
    use(CONTROL, 1);
    control_served = true
}

active proctype stopper() {
    if
    :: stopped = true
    :: skip
    fi
}

#ifdef PROGRESS
ltl waits_end { <> control_served && <> (client_served || stopped) }
#endif
