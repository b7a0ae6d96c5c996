/* The protocol's fence patterns on this machine, in the manner of litmus7: two threads run each pattern a million times, with the
 * operations of the product's own _atomics.h, and the outcomes are counted. The forbidden ones must not occur.
 *
 * Each pattern has a variant in which what forbids the outcome, a fence or a look, is left out. Where this architecture can produce
 * the outcome then, it has to be seen: otherwise the count of 0 for the pattern itself would say nothing.
 *
 *     cc -O2 -pthread -I ../../gcma_shm -o litmus litmus.c
 *     ./litmus [RUNS [PATTERN]]
 *
 * Prints a line for each pattern and variant: name; "whole" or "without"; what is to be expected of the forbidden outcome
 * ("never"; "sometimes"; "perhaps"; "unobservable": this architecture cannot show it); how often it came; how often the pattern was
 * run; and each outcome that came with its count, the forbidden marked "!". An outcome is the registers r0, r1, r2 in the
 * pattern's comment. Exits with 77 where this process may not use two processors.
 */
#include "_atomics.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BATCH 512          /* instances between two rests */
#define SPINS_MAX 2000     /* then yield: the other thread may have no processor just now */
#define DELAY_MAX 64       /* pauses before a thread begins, at random, so that every overlap comes up */
#define OUTCOMES 8         /* of three registers of one bit */
#define NO_PROCESSORS 77

/* What is to be expected of a variant. On x86 (TSO) a store may pass a later load, and nothing else passes anything. */
#define SOMETIMES "sometimes"
#if defined(__x86_64__) || defined(__i386__)
#define ELSEWHERE "unobservable"
#else
#define ELSEWHERE "perhaps"
#endif

typedef struct { uint64_t value; char rest[120]; } Word;   /* two lines: processors fetch them in pairs */

/* The shared memory of one instance. Every pattern uses a few of these words, and all begin as 0. */
typedef struct { Word claim, filling, taking, life, key, bytes, word; } Shared;

typedef void Role(Shared *m, int whole, uint8_t *out);

typedef struct {
    const char *name;
    Role *first, *second;
    uint8_t forbidden;      /* a bit for each outcome */
    const char *without;    /* what is to be expected of the variant */
} Pattern;

/* `whole` is 0 in the variant. A CAS and an acquiring load order as well as a fence does, so a plain store or load takes their place
 * there. */
#define STORE(m, field, v) store_relaxed(&(m)->field.value, v)
#define LOAD(m, field) load_acquire(&(m)->field.value)
#define LOAD_RELAXED(m, field) load_relaxed(&(m)->field.value)
#define SWING(m, field, old, new) cas(&(m)->field.value, old, new)

/* claim_filling: the claimer sees that a page is filled (r0), or the reclaim thread that it is claimed (r1).
 * Store buffering; forbidden: r0 = 0, r1 = 0. */
static void claim_first(Shared *m, int whole, uint8_t *out)
{
    if (whole) {
        SWING(m, claim, 0, 1);
        fence_full();
    } else {
        STORE(m, claim, 1);
    }
    out[0] = LOAD(m, filling) != 0;
}
static void fill_looks_at_claim(Shared *m, int whole, uint8_t *out)
{
    STORE(m, filling, 1);
    if (whole)
        fence_full();
    out[1] = LOAD(m, claim) != 0;
}

/* taking_filling: the same between the control thread and the reclaim thread. */
static void take_first(Shared *m, int whole, uint8_t *out)
{
    STORE(m, taking, 1);
    if (whole)
        fence_full();
    out[0] = LOAD(m, filling) != 0;
}
static void fill_looks_at_taking(Shared *m, int whole, uint8_t *out)
{
    STORE(m, filling, 1);
    if (whole)
        fence_full();
    out[1] = LOAD(m, taking) != 0;
}

/* taking_life: the same when the take may be over by then. r0: the control thread has to wait (and changes nothing here);
 * r1: the range is being taken; r2: the life says that it was. Forbidden: r0 = 0, r1 = 0, r2 = 0. */
static void take_all(Shared *m, int whole, uint8_t *out)
{
    STORE(m, taking, 1);
    if (whole)
        fence_full();
    out[0] = LOAD(m, filling) != 0;
    if (!out[0]) {
        STORE(m, life, 1);
        fence_full();
        store_release(&m->taking.value, 0);
    }
}
static void fill_looks_at_both(Shared *m, int whole, uint8_t *out)
{
    STORE(m, filling, 1);
    if (whole)
        fence_full();
    out[1] = LOAD(m, taking) != 0;
    out[2] = LOAD(m, life) != 0;
}

/* life_bytes: a page is granted anew while it is read. r0: the reader found a new byte; r1: and the new life, when it looked again.
 * Message passing; forbidden: r0 = 1, r1 = 0. */
static void grant_and_fill(Shared *m, int whole, uint8_t *out)
{
    (void)out;
    STORE(m, life, 1);
    if (whole)
        fence_release();
    STORE(m, bytes, 1);
}
static void copy_and_recheck(Shared *m, int whole, uint8_t *out)
{
    out[0] = LOAD_RELAXED(m, bytes) != 0;
    if (whole)
        fence_acquire();
    out[1] = LOAD_RELAXED(m, life) != 0;
}

/* publish_load: a store publishes a page. r0: the load found the new word; r1: the key; r2: the bytes.
 * Message passing; forbidden: r0 = 1 with r1 = 0 or r2 = 0. */
static void fill_and_swing(Shared *m, int whole, uint8_t *out)
{
    (void)out;
    STORE(m, key, 1);
    STORE(m, bytes, 1);
    if (whole)
        SWING(m, word, 0, 1);
    else
        STORE(m, word, 1);
}
static void load_by_word(Shared *m, int whole, uint8_t *out)
{
    out[0] = (whole ? LOAD(m, word) : LOAD_RELAXED(m, word)) != 0;
    out[1] = LOAD_RELAXED(m, key) != 0;
    out[2] = LOAD_RELAXED(m, bytes) != 0;
}

/* lend_load: a claimer lends again. r0: the load found the range lent; r1: and the swept life.
 * Message passing; forbidden: r0 = 1, r1 = 0. */
static void sweep_and_lend(Shared *m, int whole, uint8_t *out)
{
    (void)out;
    STORE(m, life, 1);
    if (whole)
        SWING(m, claim, 0, 1);
    else
        STORE(m, claim, 1);
}
static void load_claim_then_life(Shared *m, int whole, uint8_t *out)
{
    out[0] = (whole ? LOAD(m, claim) : LOAD_RELAXED(m, claim)) != 0;
    out[1] = LOAD_RELAXED(m, life) != 0;
}

/* claim_bytes: a claimer writes while a load copies. r0: the load found a guest's byte; r1: and the claim, when it looked again.
 * Message passing; forbidden: r0 = 1, r1 = 0. */
static void claim_and_write(Shared *m, int whole, uint8_t *out)
{
    (void)out;
    if (whole) {
        SWING(m, claim, 0, 1);
        fence_full();
    } else {
        STORE(m, claim, 1);
    }
    STORE(m, bytes, 1);
}
static void copy_and_claim_again(Shared *m, int whole, uint8_t *out)
{
    out[0] = LOAD_RELAXED(m, bytes) != 0;
    if (whole)
        fence_acquire();
    out[1] = LOAD_RELAXED(m, claim) != 0;
}

/* load_claim_lend: all of a load against a claim and a lend; claim is the generation, odd while claimed. r0: a guest's byte was copied;
 * r1: the life was PUBLISHED (0) before, and the same after; r2: the claim was lent before, and the same after. Forbidden: all 1.
 * The variant leaves out not a fence but load.claim_again, which every architecture shows. */
static void claim_write_lend(Shared *m, int whole, uint8_t *out)
{
    (void)whole;
    (void)out;
    SWING(m, claim, 0, 1);
    fence_full();
    STORE(m, bytes, 1);
    for (int i = 0; i < 8; i++)     /* a guest has it for a while */
        cpu_relax();
    fence_release();
    STORE(m, life, 1);
    SWING(m, claim, 1, 2);
}
static void load_all(Shared *m, int whole, uint8_t *out)
{
    uint64_t life = LOAD(m, life), claim = LOAD(m, claim);
    for (int i = 0; i < 4; i++)     /* a page is longer than a word */
        cpu_relax();
    out[0] = LOAD_RELAXED(m, bytes) != 0;
    fence_acquire();
    out[1] = life == 0 && LOAD_RELAXED(m, life) == life;
    out[2] = claim % 2 == 0 && (!whole || LOAD_RELAXED(m, claim) == claim);
}

#define OUTCOME(r0, r1, r2) ((r0) << 2 | (r1) << 1 | (r2))
#define BIT(r0, r1, r2) (1u << OUTCOME(r0, r1, r2))

static const Pattern PATTERNS[] = {
    {"claim_filling", claim_first, fill_looks_at_claim, BIT(0, 0, 0), SOMETIMES},
    {"taking_filling", take_first, fill_looks_at_taking, BIT(0, 0, 0), SOMETIMES},
    {"taking_life", take_all, fill_looks_at_both, BIT(0, 0, 0), SOMETIMES},
    {"life_bytes", grant_and_fill, copy_and_recheck, BIT(1, 0, 0), ELSEWHERE},
    {"publish_load", fill_and_swing, load_by_word, BIT(1, 0, 0) | BIT(1, 0, 1) | BIT(1, 1, 0), ELSEWHERE},
    {"lend_load", sweep_and_lend, load_claim_then_life, BIT(1, 0, 0), ELSEWHERE},
    {"claim_bytes", claim_and_write, copy_and_claim_again, BIT(1, 0, 0), ELSEWHERE},
    {"load_claim_lend", claim_write_lend, load_all, BIT(1, 1, 1), SOMETIMES},
};
enum { PATTERN_COUNT = sizeof PATTERNS / sizeof *PATTERNS };

typedef struct {
    const Pattern *pattern;
    int whole, cpu[2];
    uint64_t runs;
    Shared *memory;             /* BATCH instances */
    uint8_t (*out)[4];          /* their registers */
    Word at[2];                 /* how far each thread is: steps of `meet` */
    uint64_t counts[OUTCOMES];
} Test;

typedef struct { Test *test; int number; } Thread;

/* Both threads leave at nearly the same moment. */
static void meet(Test *t, int me, uint64_t step)
{
    store_release(&t->at[me].value, step);
    for (unsigned spins = 0; load_acquire(&t->at[1 - me].value) < step; spins++) {
        if (spins < SPINS_MAX)
            cpu_relax();
        else
            sched_yield();
    }
}

static void *run(void *argument)
{
    Thread *thread = argument;
    Test *t = thread->test;
    int me = thread->number;
    Role *role = me ? t->pattern->second : t->pattern->first;
    uint64_t step = 0, random = 88172645463325252u + (uint64_t)me;
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(t->cpu[me], &cpus);
    pthread_setaffinity_np(pthread_self(), sizeof cpus, &cpus);
    for (uint64_t done = 0; done < t->runs; done += BATCH) {
        if (me == 0) {
            memset(t->memory, 0, BATCH * sizeof(Shared));
            memset(t->out, 0, BATCH * sizeof *t->out);
        }
        meet(t, me, ++step);
        for (int i = 0; i < BATCH; i++) {
            random ^= random << 13, random ^= random >> 7, random ^= random << 17;
            meet(t, me, ++step);
            for (unsigned pauses = random % DELAY_MAX; pauses > 0; pauses--)
                __asm__ __volatile__("" ::: "memory");
            role(&t->memory[i], t->whole, t->out[i]);
        }
        meet(t, me, ++step);
        if (me == 0) {
            for (int i = 0; i < BATCH; i++)
                t->counts[OUTCOME(t->out[i][0], t->out[i][1], t->out[i][2])]++;
        }
    }
    return 0;
}

static void report(const Test *t)
{
    uint64_t forbidden = 0;
    for (unsigned outcome = 0; outcome < OUTCOMES; outcome++)
        forbidden += t->pattern->forbidden >> outcome & 1 ? t->counts[outcome] : 0;
    printf("%-16s %-8s %-13s %10llu %10llu ", t->pattern->name, t->whole ? "whole" : "without",
           t->whole ? "never" : t->pattern->without, (unsigned long long)forbidden, (unsigned long long)t->runs);
    for (unsigned outcome = 0; outcome < OUTCOMES; outcome++)
        if (t->counts[outcome])
            printf(" %u%u%u%s:%llu", outcome >> 2, outcome >> 1 & 1, outcome & 1,
                   t->pattern->forbidden >> outcome & 1 ? "!" : "", (unsigned long long)t->counts[outcome]);
    printf("\n");
    fflush(stdout);
}

static int test(const Pattern *pattern, int whole, uint64_t runs, const int *cpu)
{
    static Test t;
    Thread threads[2] = {{&t, 0}, {&t, 1}};
    pthread_t second;
    memset(&t, 0, sizeof t);
    t.pattern = pattern;
    t.whole = whole;
    t.cpu[0] = cpu[0], t.cpu[1] = cpu[1];
    t.runs = (runs + BATCH - 1) / BATCH * BATCH;
    t.memory = aligned_alloc(128, BATCH * sizeof(Shared));
    t.out = calloc(BATCH, sizeof *t.out);
    if (!t.memory || !t.out || pthread_create(&second, 0, run, &threads[1])) {
        perror("litmus");
        return 1;
    }
    run(&threads[0]);
    pthread_join(second, 0);
    report(&t);
    free(t.memory);
    free(t.out);
    return 0;
}

static int two_processors(int *cpu)
{
    cpu_set_t cpus;
    int found = 0;
    if (sched_getaffinity(0, sizeof cpus, &cpus))
        return 0;
    for (int i = 0; i < CPU_SETSIZE && found < 2; i++)
        if (CPU_ISSET(i, &cpus))
            cpu[found++] = i;
    return found == 2;
}

int main(int argc, char **argv)
{
    uint64_t runs = argc > 1 ? strtoull(argv[1], 0, 10) : 1000000;
    int cpu[2], failed = 0;
    if (!two_processors(cpu)) {
        fprintf(stderr, "litmus: two processors are needed, this process may use one\n");
        return NO_PROCESSORS;
    }
    for (int i = 0; i < PATTERN_COUNT && !failed; i++) {
        if (argc > 2 && strcmp(argv[2], PATTERNS[i].name) != 0)
            continue;
        failed = test(&PATTERNS[i], 1, runs, cpu) || test(&PATTERNS[i], 0, runs, cpu);
    }
    return failed;
}
