use super::*;
use policy::disk::VolumeOperation;
use policy::document::KeyMemory;
use policy::encoding::Digest;
use policy::{HostId, Operation};
use std::collections::BTreeMap;

const RUN: &str = r#"permit (principal in Cloud::"north", action == Action::"vm.power-on", resource);"#;
const ALL: &str = "permit (principal, action, resource);";

fn parse(rules: &str) -> CedarPolicy {
    CedarPolicy::parse(rules).unwrap_or_else(|e| panic!("{e}"))
}

fn refused(rules: &str) -> String {
    match CedarPolicy::parse(rules) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("accepted: {rules}"),
    }
}

/// What `rules` say to a power-on of acme's VM payroll on a host of the cloud north, asked as `change` makes it.
fn ask(rules: &str, change: impl FnOnce(&mut Question<'_>)) -> Verdict {
    let none = BTreeMap::new();
    let mut question = Question {
        host: HostId(Digest([0xab; 32])),
        lab: false,
        cloud: "north".parse().expect("a cloud"),
        customer: "acme".parse().expect("a customer"),
        vm: "payroll".parse().expect("a VM"),
        operation: Operation::PowerOn,
        instance: None,
        time_unix_s: 1_700_000_000,
        key_memory: KeyMemory::MemfdSecret,
        ptrace_scope: Some(3),
        parameters: &none,
        operations_last_hour: 0,
    };
    change(&mut question);
    parse(rules).decide(&question)
}

fn permits(rules: &str, change: impl FnOnce(&mut Question<'_>)) -> bool {
    matches!(ask(rules, change), Verdict::Permit { .. })
}

fn reason(verdict: Verdict) -> String {
    match verdict {
        Verdict::Refuse { reason } => reason,
        Verdict::Permit { rules } => panic!("permitted by {rules:?}"),
    }
}

#[test]
fn a_rule_permits_what_it_says_and_is_named() {
    assert_eq!(ask(RUN, |_| ()), Verdict::Permit { rules: vec!["rule 1".into()] });
    let named = format!("@id(\"start here\") {RUN} @id(\"and so\") {RUN}");
    assert_eq!(ask(&named, |_| ()), Verdict::Permit { rules: vec!["and so".into(), "start here".into()] });
}

#[test]
fn no_policy_and_no_rule_mean_no() {
    assert_eq!(reason(ask("", |_| ())), "the customer's policy has no rule");
    assert_eq!(reason(ask("// nothing\n", |_| ())), "the customer's policy has no rule");
    ask(RUN, |question| assert_eq!(reason(decide(None, question)), "the customer has no policy"));
    ask(RUN, |question| assert!(matches!(decide(Some(&parse(RUN)), question), Verdict::Permit { .. })));
}

#[test]
fn what_no_rule_permits_is_refused() {
    let said = reason(ask(RUN, |q| q.operation = Operation::Renew));
    assert_eq!(said, "no rule of the policy permits vm.renew of VM payroll");
    assert!(!permits(RUN, |q| q.cloud = "south".parse().expect("a cloud")));
    assert!(!permits("permit (principal, action, resource) when { false };", |_| ()));
}

#[test]
fn forbid_wins() {
    let rules = format!("{ALL} @id(\"no lab\") forbid (principal, action, resource) when {{ principal.lab }};");
    assert!(permits(&rules, |_| ()));
    assert_eq!(reason(ask(&rules, |q| q.lab = true)), "the policy forbids vm.power-on of VM payroll (no lab)");
}

#[test]
fn a_core_dump_must_be_permitted_by_name() {
    let dump = |q: &mut Question<'_>| q.operation = Operation::CoreDump;
    let said = reason(ask(ALL, dump));
    assert_eq!(said, "no rule of the policy names vm.coredump, which is permitted by name only");
    let resize = |q: &mut Question<'_>| q.operation = Operation::ResizeDisk;
    assert!(reason(ask(ALL, resize)).contains("names vm.resize-disk, which is permitted by name only"));
    assert!(permits(r#"permit (principal, action == Action::"vm.resize-disk", resource);"#, resize));
    let by_condition = r#"permit (principal, action, resource) when { action == Action::"vm.coredump" };"#;
    assert!(!permits(by_condition, dump));
    let by_name = r#"permit (principal, action == Action::"vm.coredump", resource);"#;
    assert_eq!(ask(&format!("{ALL}{by_name}"), dump), Verdict::Permit { rules: vec!["rule 2".into()] });
    let in_list = r#"permit (principal, action in [Action::"vm.renew", Action::"vm.coredump"], resource);"#;
    assert!(permits(in_list, dump));
    assert!(!permits(&format!("{by_name} forbid (principal, action, resource);"), dump));
}

#[test]
fn an_evaluation_error_means_no_even_where_another_rule_permits() {
    let overflow = "permit (principal, action, resource) when { 9223372036854775807 + context.time > 0 };";
    let said = reason(ask(&format!("{ALL}{overflow}"), |_| ()));
    assert!(said.starts_with("the policy can't be evaluated: ") && said.contains("rule 2"), "{said}");
    assert!(!permits(
        &format!("{ALL}{overflow}")
            .replace("permit (principal, action, resource) when", "forbid (principal, action, resource) when"),
        |_| ()
    ));
}

#[test]
fn a_number_that_cedar_cannot_hold_means_no() {
    assert!(!permits(ALL, |q| q.time_unix_s = u64::MAX));
    assert!(!permits(ALL, |q| q.operations_last_hour = u64::MAX));
    assert!(permits(ALL, |q| q.operations_last_hour = i64::MAX as u64));
}

#[test]
fn free_operations_are_not_for_rules() {
    assert_eq!(reason(ask(ALL, |q| q.operation = Operation::Pause)), "vm.pause is free: no rule decides it");
    let said = refused(r#"forbid (principal, action == Action::"vm.pause", resource);"#);
    assert!(said.starts_with("rule 1 does not fit the schema: ") && said.contains("vm.pause"), "{said}");
}

#[test]
fn every_operation_that_rules_decide_is_in_the_schema_and_no_other() {
    for operation in Operation::ALL {
        let rule = format!("permit (principal, action == Action::\"{operation}\", resource);");
        assert_eq!(CedarPolicy::parse(&rule).is_ok(), operation.class() != OperationClass::Free, "{operation}");
    }
}

/// What `rules` say to a revert of acme's volume root that ann asks for.
fn ask_volume(rules: &str, change: impl FnOnce(&mut VolumeQuestion<'_>)) -> Verdict {
    let parameters = BTreeMap::from([("snapshot".to_owned(), "3".to_owned())]);
    let mut question = VolumeQuestion {
        administrator: "ann",
        customer: "acme".parse().expect("a customer"),
        volume: "root",
        operation: VolumeOperation::Revert,
        time_unix_s: 1_700_000_000,
        parameters: &parameters,
    };
    change(&mut question);
    parse(rules).decide_volume(&question)
}

#[test]
fn operations_on_volumes_are_permitted_by_name_and_told_apart() {
    for operation in VolumeOperation::ALL {
        let rule = format!("permit (principal, action == Action::\"{operation}\", resource);");
        for asked in VolumeOperation::ALL {
            let verdict = ask_volume(&rule, |q| q.operation = asked);
            assert_eq!(matches!(verdict, Verdict::Permit { .. }), asked == operation, "{asked} by {operation}");
        }
        assert!(!permits(&rule, |_| ()), "a rule about volumes says nothing about VMs");
    }
    assert_eq!(
        reason(ask_volume(ALL, |_| ())),
        "no rule of the policy names volume.revert, which is permitted by name only"
    );
    assert_eq!(reason(ask_volume(RUN, |_| ())), "the customer's policy has no rule");
    let revert = r#"permit (principal, action == Action::"volume.revert", resource);"#;
    let night =
        format!("{ALL} {revert} @id(\"by day\") forbid (principal, action, resource) when {{ context.hour > 20 }};");
    assert_eq!(reason(ask_volume(&night, |_| ())), "the policy forbids volume.revert of volume root (by day)");
    assert!(reason(ask(&night, |_| ())).contains("(by day)"), "a rule that fits both vocabularies counts for both");
}

#[test]
fn rules_see_who_asks_for_which_volume_with_what() {
    let rule = |scope: &str, when: &str| format!("permit ({scope}) when {{ {when} }};");
    let scope = r#"principal == Administrator::"ann", action == Action::"volume.revert", resource == Volume::"root""#;
    let when = r#"resource in Customer::"acme" && context.parameters.getTag("snapshot") == "3""#;
    let tagged = rule(scope, &format!(r#"context.parameters.hasTag("snapshot") && {when}"#));
    assert!(matches!(ask_volume(&tagged, |_| ()), Verdict::Permit { .. }));
    assert!(matches!(ask_volume(&tagged, |q| q.administrator = "bob"), Verdict::Refuse { .. }));
    assert!(matches!(ask_volume(&tagged, |q| q.volume = "data"), Verdict::Refuse { .. }));
    let said = refused(r#"permit (principal, action == Action::"volume.revert", resource) when { principal.lab };"#);
    assert!(said.contains("lab") && !said.contains("volume.revert"), "of the vocabulary that was meant: {said}");
    let mixed = r#"permit (principal, action in [Action::"vm.renew", Action::"volume.erase"], resource);"#;
    assert!(refused(mixed).contains("vm.renew"), "two vocabularies in one rule");
}

#[test]
fn rules_see_the_circumstances() {
    let when = |condition: &str| format!("permit (principal, action, resource) when {{ {condition} }};");
    // 14 November 2023, 22:13:20 UTC, a Tuesday.
    for holds in [
        "context.time == 1700000000 && context.hour == 22 && context.weekday == 2",
        "context.key_memory == \"memfd-secret\" && context has ptrace_scope && context.ptrace_scope == 3",
        "!(context has instance) && context.operations_last_hour == 0",
        "resource in Customer::\"acme\" && resource == Vm::\"payroll\" && principal is Host",
        &format!("principal == Host::\"{}\"", "ab".repeat(32)),
        "!context.parameters.hasTag(\"reason\")",
    ] {
        assert!(permits(&when(holds), |_| ()), "{holds}");
        assert!(!permits(&when(&format!("!({holds})")), |_| ()), "{holds}");
    }
    let parameters = BTreeMap::from([("reason".to_owned(), "ticket 7".to_owned())]);
    let by_reason = r#"context.parameters.hasTag("reason") && context.parameters.getTag("reason") like "ticket *""#;
    ask(&when(by_reason), |q| {
        let q = Question { parameters: &parameters, ..q.clone() };
        assert!(matches!(parse(&when(by_reason)).decide(&q), Verdict::Permit { .. }));
    });
    assert!(permits(&when("context has instance && context.instance == 7"), |q| q.instance = 7.try_into().ok()));
    assert!(permits(&when("context.key_memory == \"mlock\""), |q| q.key_memory = KeyMemory::Mlock));
    assert!(permits(&when("!(context has ptrace_scope)"), |q| q.ptrace_scope = None));
}

#[test]
fn what_does_not_fit_the_schema_is_refused_in_one_line() {
    for (rules, word) in [
        (r#"permit (principal == User::"x", action, resource);"#, "User"),
        (r#"permit (principal, action == Action::"vm.explode", resource);"#, "vm.explode"),
        ("permit (principal, action, resource) when { context.nothing == 1 };", "nothing"),
        ("permit (principal, action, resource) when { context.instance == 1 };", "instance"),
        ("permit (principal, action, resource) when { context.time == \"now\" };", "type"),
        ("permit (principal, action, resource) when { principal.lab == 3 };", "type"),
        ("permit (principal, action, resource) when { context.parameters.getTag(\"x\") == \"y\" };", "tag"),
    ] {
        let said = refused(&format!("{ALL}\n@id(\"odd one\") {rules}"));
        assert!(said.starts_with("odd one does not fit the schema: ") && said.contains(word), "{said}");
        assert!(!said.contains('\n'), "{said}");
    }
}

#[test]
fn what_is_not_cedar_is_refused_in_one_line() {
    for rules in [
        "permit;",
        "permit (principal, action);",
        "allow (principal, action, resource);",
        "permit (principal in ?principal, action, resource);",
        "permit (principal, action, resource) when { lookup(\"10.0.0.1\") };",
    ] {
        let said = refused(&format!("{ALL}\n\n{rules}"));
        assert!(said.starts_with("rule 2 (line 3) is not Cedar: ") || said.starts_with("rule 2 does not"), "{said}");
        assert!(!said.contains('\n') && said.len() < 400, "{said}");
    }
}

#[test]
fn names_are_short_and_unlike() {
    for rules in [format!("@id(\"a\") {ALL} @id(\"a\") {ALL}"), format!("{ALL} @id(\"rule 1\") {ALL}")] {
        assert!(refused(&rules).starts_with("rule 2 (line 1): an @id is "), "{rules}");
    }
    for name in ["", "ü", &"x".repeat(65)] {
        assert!(refused(&format!("@id(\"{name}\") {ALL}")).starts_with("rule 1 (line 1): an @id is "));
    }
    assert!(refused("permit (principal, action, resource) when { \"a\u{430}\" == \"\" };").contains("rule 1"));
}

/// The deepest rules of every kind that the bounds let through: they must parse, be checked, be asked on this thread's
/// ordinary stack, and be dropped.
#[test]
fn the_deepest_rules_overflow_no_stack() {
    let when = |condition: String| format!("permit (principal, action, resource) when {{ {condition} }};");
    let chain = |link: &str, n| format!("{}true", link.repeat(n));
    let sum = format!("1{} > 0", " + 1".repeat(400));
    let deep = format!("{}true{}", "(".repeat(22), ")".repeat(22));
    let ifs = format!("{} true", "if true then false else ".repeat(24));
    let negated = format!("{}true{}", "!(".repeat(22), ")".repeat(22));
    let record = format!("{}1{}{} == 1", "{a: ".repeat(22), "}".repeat(22), ".a".repeat(22));
    let mixed = format!("{}true{}", "(if true then !!!!((".repeat(7), ")) else true)".repeat(7));
    for condition in [chain("true && ", 240), chain("false || ", 240), sum, deep, ifs, negated, record, mixed] {
        let rules = when(condition);
        let policy = CedarPolicy::parse(&rules).unwrap_or_else(|e| panic!("{e}: {rules}"));
        ask(ALL, |question| match policy.decide(question) {
            Verdict::Refuse { reason } => {
                assert!(reason.starts_with("no rule of the policy permits"), "{reason}: {rules}")
            }
            Verdict::Permit { .. } => {}
        });
    }
}

#[test]
fn attack_39_bombs_are_refused_quickly() {
    let whole = |unit: &str| unit.repeat(DOCUMENT_LIMIT / unit.len());
    let tail = |unit: &str| {
        let head = "permit (principal, action, resource) when { ";
        let room = DOCUMENT_LIMIT - head.len() - 8;
        format!("{head}{}true }};", unit.repeat(room / unit.len()))
    };
    for unit in [
        "(",
        "[",
        "{",
        "!",
        "-",
        "if ",
        "true && ",
        "1 + ",
        "a.",
        "a::",
        "\"",
        "//",
        ";",
        "@id(\"x\")",
        "permit ",
        "{a:",
        "x[",
        "\\",
        "\"\\",
    ] {
        // A text of comments alone is fine; it permits nothing.
        assert_eq!(CedarPolicy::parse(&whole(unit)).is_ok(), unit == "//", "{unit}");
        assert!(CedarPolicy::parse(&tail(unit)).is_err(), "{unit}");
    }
    assert!(matches!(CedarPolicy::parse(&" ".repeat(DOCUMENT_LIMIT + 1)), Err(CedarError::Length)));
}

#[test]
fn a_large_policy_is_fine() {
    let rules: String = (0..1000).map(|n| format!("permit (principal, action == Action::\"vm.power-on\", resource == Vm::\"vm-{n}\") when {{ context.hour < 25 }};\n")).collect();
    assert!(permits(&rules, |q| q.vm = "vm-999".parse().expect("a VM")));
    assert!(!permits(&rules, |q| q.vm = "vm-1000".parse().expect("a VM")));
    let hosts: String = (0..2000).map(|n| format!("Host::\"{n:064x}\", ")).collect();
    let rules = format!("permit (principal, action, resource) when {{ [{hosts}].contains(principal) }};");
    assert!(permits(&rules, |q| q.host = format!("{:064x}", 1999).parse().expect("a host")));
}
