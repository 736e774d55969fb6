//! Compiles the readable lists in `seccomp/` to BPF programs, which the program embeds: the same filter in every build.
//!
//! A list has one rule a line; `#` begins a comment:
//!
//! ```text
//! include NAME                      # all rules of another list
//! read                              # with any arguments
//! ioctl 1 == KVM_RUN                # where argument 1 (from 0, 32 bits) is this
//! ioctl 1 & 0xff00 == 0xae00        # where it is this after masking
//! mmap 2 & PROT_EXEC == 0, 3 & MAP_SHARED == 0      # both
//! tgkill 0 == SELF                  # where it is the process's own id, put in when the filter is installed
//! ```
//!
//! Two rules of one system call are alternatives. What no rule allows kills the process. `clone3` alone is answered with
//! ENOSYS, because its flags lie in memory where no filter sees them: the C library then takes `clone`.

use serde_json::{Value, json};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;

const LISTS: [&str; 14] = [
    "main",
    "provider",
    "vcpu",
    "disk",
    "rng",
    "net",
    "balloon",
    "virtio-console",
    "vsock",
    "console",
    "slots",
    "api",
    "opener",
    "ctl",
];

fn main() {
    println!("cargo::rerun-if-changed=seccomp");
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    for name in LISTS {
        let mut rules = Vec::new();
        read_list(name, &mut rules);
        let program = compile(name, rules);
        std::fs::write(Path::new(&out).join(format!("{name}.rs")), program).expect("OUT_DIR is writable");
    }
}

fn read_list(name: &str, rules: &mut Vec<Value>) {
    let path = format!("seccomp/{name}.list");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        match line.split_once(' ') {
            _ if line.is_empty() => {}
            Some(("include", other)) => read_list(other.trim(), rules),
            Some((call, conditions)) => {
                let args: Vec<_> = conditions.split(',').map(|text| condition(&path, text.trim())).collect();
                rules.push(json!({ "syscall": call, "args": args }));
            }
            None => rules.push(json!({ "syscall": line })),
        }
    }
}

fn condition(path: &str, text: &str) -> Value {
    let words: Vec<_> = text.split_whitespace().collect();
    let (index, op, value) = match words[..] {
        [index, "==", value] => (index, json!("eq"), value),
        [index, "&", mask, "==", value] => (index, json!({ "masked_eq": number(path, mask) }), value),
        _ => panic!("{path}: '{text}' is no condition"),
    };
    json!({ "index": number(path, index), "type": "dword", "op": op, "val": number(path, value) })
}

fn compile(name: &str, rules: Vec<Value>) -> String {
    // A call listed with and without conditions is allowed without.
    let free: Vec<Value> = rules.iter().filter(|r| r.get("args").is_none()).map(|r| r["syscall"].clone()).collect();
    let mut filter: Vec<Value> = Vec::new();
    for rule in rules {
        if (rule.get("args").is_some() && free.contains(&rule["syscall"])) || filter.contains(&rule) {
            continue;
        }
        filter.push(rule);
    }
    let listed = assemble(name, &filter);
    filter.retain(|rule| rule.get("args").is_some_and(|args| args != &json!([])));
    let mut whole = FIRST.to_vec();
    whole.extend(decide(name, &listed));
    whole.extend(assemble(name, &filter));
    for nr in 0..=CALLS {
        let expected = if nr == CLONE3 { Some(ERRNO_ENOSYS) } else { fate(&listed, X86_64, nr) };
        assert_eq!(fate(&whole, X86_64, nr), expected, "seccomp/{name}.list: system call {nr}");
        assert_eq!(fate(&whole, I386, nr), Some(KILL_PROCESS), "seccomp/{name}.list: system call {nr} of 32 bits");
    }
    let mut out = String::from("[\n");
    for (code, jt, jf, k) in whole {
        writeln!(out, "    ({code}, {jt}, {jf}, {k}),").expect("a string takes everything");
    }
    out.push_str("]\n");
    out
}

fn assemble(name: &str, filter: &[Value]) -> Vec<Instruction> {
    let text = json!({ name: { "mismatch_action": "kill_process", "match_action": "allow", "filter": filter } });
    let arch = std::env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it");
    let arch = arch.as_str().try_into().unwrap_or_else(|e| panic!("{arch}: {e}"));
    let mut compiled = seccompiler::compile_from_json(text.to_string().as_bytes(), arch)
        .unwrap_or_else(|e| panic!("seccomp/{name}.list: {e}"));
    let program = compiled.remove(name).expect("compiled above");
    program.iter().map(|i| (i.code, i.jt, i.jf, i.k)).collect()
}

/// Code, jumps where true and where false, operand (linux/filter.h).
type Instruction = (u16, u8, u8, u32);

const LOAD_WORD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;
const KILL_PROCESS: u32 = 0x8000_0000;
const ALLOW: u32 = 0x7fff_0000;
const CLONE3: u32 = 435;
/// More system calls than there are.
const CALLS: u32 = 1024;

const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
const ERRNO_ENOSYS: u32 = 0x0005_0000 | 38;

/// Calls of another architecture kill, clone3 is unknown; and the number is loaded for what follows.
const FIRST: [Instruction; 6] = [
    (LOAD_WORD, 0, 0, 4),
    (JUMP_EQUAL, 1, 0, X86_64),
    (RETURN, 0, 0, KILL_PROCESS),
    (LOAD_WORD, 0, 0, 0),
    (JUMP_EQUAL, 0, 1, CLONE3),
    (RETURN, 0, 0, ERRNO_ENOSYS),
];

/// What `program` answers for each call whatever its arguments are, found by bisection, and a way on for calls whose arguments
/// decide. The kernel asks a new filter about each call that there is, and `program` alone would be gone through to its end for
/// most of them: a third of a millisecond for each filter.
fn decide(name: &str, program: &[Instruction]) -> Vec<Instruction> {
    // Where each run of calls with the same fate begins; the last one, which goes on beyond all calls, kills.
    let mut runs: Vec<(u32, Option<u32>)> = Vec::new();
    for nr in 0..=CALLS {
        let fate = fate(program, X86_64, nr);
        if runs.last().is_none_or(|(_, last)| *last != fate) {
            runs.push((nr, fate));
        }
    }
    let ends: [Option<u32>; 3] = [Some(KILL_PROCESS), Some(ALLOW), None];
    let mut tree = Vec::new();
    bisect(&runs, &mut tree);
    let end = |fate: Option<u32>| {
        let at = ends.iter().position(|end| *end == fate);
        tree.len() + at.unwrap_or_else(|| panic!("seccomp/{name}.list: an answer of an unknown kind"))
    };
    let distance = |from: usize, to: Target| {
        let to = match to {
            Target::At(at) => at,
            Target::End(fate) => end(fate),
        };
        u8::try_from(to - from - 1).unwrap_or_else(|_| panic!("seccomp/{name}.list is too long"))
    };
    let jumps = tree
        .iter()
        .enumerate()
        .map(|(at, (bound, yes, no))| (JUMP_AT_LEAST, distance(at, *yes), distance(at, *no), *bound));
    jumps.chain([(RETURN, 0, 0, KILL_PROCESS), (RETURN, 0, 0, ALLOW)]).collect()
}

/// Where a comparison leads.
#[derive(Clone, Copy)]
enum Target {
    At(usize),
    End(Option<u32>),
}

/// Appends the comparisons that find the run which a number is in. Gives the place of the first.
fn bisect(runs: &[(u32, Option<u32>)], tree: &mut Vec<(u32, Target, Target)>) -> Target {
    let ([(_, fate)] | [.., (_, fate)]) = runs else { panic!("there is a run at least") };
    if runs.len() == 1 {
        return Target::End(*fate);
    }
    let (at, middle) = (tree.len(), runs.len() / 2);
    tree.push((runs[middle].0, Target::At(at), Target::At(at)));
    let no = bisect(&runs[..middle], tree);
    let yes = bisect(&runs[middle..], tree);
    tree[at] = (runs[middle].0, yes, no);
    Target::At(at)
}

/// What `program` returns for a call of an architecture; none where that depends on its arguments.
fn fate(program: &[Instruction], architecture: u32, nr: u32) -> Option<u32> {
    let (mut at, mut word) = (0, 0);
    loop {
        let (code, jt, jf, k) = program[at];
        at += 1;
        match code {
            LOAD_WORD if k == 0 => word = nr,
            LOAD_WORD if k == 4 => word = architecture,
            LOAD_WORD => return None,
            JUMP => at += k as usize,
            JUMP_EQUAL => at += usize::from(if word == k { jt } else { jf }),
            JUMP_AT_LEAST => at += usize::from(if word >= k { jt } else { jf }),
            RETURN => return Some(k),
            other => panic!("an instruction of an unknown kind: {other:#x}"),
        }
    }
}

fn number(path: &str, text: &str) -> u64 {
    if let Some(hex) = text.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).unwrap_or_else(|e| panic!("{path}: {text}: {e}"));
    }
    if let Ok(n) = text.parse() {
        return n;
    }
    let names: HashMap<&str, u64> = NAMES.into_iter().collect();
    *names.get(text).unwrap_or_else(|| panic!("{path}: '{text}' has no value in build.rs"))
}

/// Values of Linux' headers for x86_64.
const NAMES: [(&str, u64); 45] = [
    ("SELF", 0x5e1f_5e1f),
    ("AT_EMPTY_PATH", 0x1000),
    ("AF_UNIX", 1),
    ("AF_INET", 2),
    ("AF_INET6", 10),
    ("PROT_EXEC", 4),
    ("MAP_ANONYMOUS", 0x20),
    ("PR_SET_NAME", 15),
    ("PR_SET_NO_NEW_PRIVS", 38),
    ("SECCOMP_SET_MODE_FILTER", 1),
    ("PR_SET_VMA", 0x5356_4d41),
    ("SOL_SOCKET", 1),
    ("TCGETS", 0x5401),
    ("TCSETS", 0x5402),
    ("TCSETSW", 0x5403),
    ("TCSETSF", 0x5404),
    ("TIOCGWINSZ", 0x5413),
    ("TCGETS2", 0x802c_542a),
    ("TCSETS2", 0x402c_542b),
    ("TCSETSW2", 0x402c_542c),
    ("TCSETSF2", 0x402c_542d),
    ("FIONBIO", 0x5421),
    ("BLKGETSIZE64", 0x8008_1272),
    ("KVM_RUN", 0xae80),
    ("KVM_GET_REGS", 0x8090_ae81),
    ("KVM_GET_SREGS", 0x8138_ae83),
    ("KVM_GET_VCPU_EVENTS", 0x8040_ae9f),
    ("KVM_GET_XCRS", 0x8188_aea6),
    ("KVM_GET_FPU", 0x81a0_ae8c),
    ("KVM_GET_LAPIC", 0x8400_ae8e),
    ("KVM_GET_MP_STATE", 0x8004_ae98),
    ("KVM_IRQFD", 0x4020_ae76),
    ("KVM_IOEVENTFD", 0x4040_ae79),
    ("KVM_SET_GSI_ROUTING", 0x4008_ae6a),
    ("IORING_REGISTER_ENABLE_RINGS", 12),
    ("TUNSETOFFLOAD", 0x4004_54d0),
    ("TUNSETQUEUE", 0x4004_54d9),
    ("F_GETFD", 1),
    ("F_SETFD", 2),
    ("F_GETFL", 3),
    ("F_SETFL", 4),
    ("F_DUPFD_CLOEXEC", 1030),
    ("F_GET_SEALS", 1034),
    ("F_OFD_SETLK", 37),
    ("THREAD_FLAGS", 0x003d_0f00),
];
