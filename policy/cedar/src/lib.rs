//! The customer's rules, decided by the Cedar engine.
//!
//! ```text
//! @id("start in our cloud, by day")
//! permit (principal in Cloud::"north", action == Action::"vm.power-on", resource)
//! when { context.hour >= 6 && context.hour < 20 };
//! ```
//!
//! Principal is the attested [`Host`](Question::host), action the operation, resource the VM; `schema.cedarschema` beside this
//! file says what else rules may speak of. Operations on a volume are asked for by an administrator, and have a vocabulary of their own
//! in `volumes.cedarschema`: a rule counts for the questions whose vocabulary it fits. What no rule permits is refused, a
//! `forbid` wins over every `permit`, and so does any rule that can't be evaluated (Cedar itself would skip it). A restricted
//! operation is permitted only by a rule whose scope names it: `permit (principal, action, resource)` does not permit a core dump.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `rules` | rules as text, bounded and cut, before the engine sees them |
//! | `question` | a question and how it looks to the engine |
//! | this one | rules accepted, and the verdict |

pub mod fuzz;
mod question;
mod rules;

use cedar_policy::{
    ActionConstraint, Authorizer, Decision, Effect, Entities, EntityUid, Policy, PolicyId, PolicySet, Request,
    Response, Schema, ValidationMode, ValidationWarning, Validator,
};
use policy::OperationClass;
use policy::document::DOCUMENT_LIMIT;
pub use question::{Question, VolumeQuestion};
pub use rules::RulesError;
use rules::{Rule, one_line};
use std::io;

/// What rules may speak of: about VMs, and about volumes.
const SCHEMAS: [&str; 2] = [include_str!("schema.cedarschema"), include_str!("volumes.cedarschema")];

/// Stack of the thread that parses. Cedar's parser and checker recurse; [`rules`] bounds how deep, and this is several times
/// what the deepest rules that it lets through were seen to take (1 MiB was enough for them in an unoptimised build).
const PARSE_STACK: usize = 16 << 20;

/// A customer's rules, checked against the schemas.
pub struct CedarPolicy {
    vms: Rules,
    volumes: Rules,
}

/// The rules that fit one schema.
struct Rules {
    schema: Schema,
    rules: PolicySet,
}

/// What is asked, beside what the engine is told.
struct Asked<'a> {
    /// The operation, and what it would be done to: for people.
    operation: &'a str,
    object: String,
    /// The operation, to the engine.
    action: Result<EntityUid, String>,
    restricted: bool,
}

/// The answer to a question.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Yes, and which rules say so.
    Permit {
        /// Names of the rules (`@id`, otherwise "rule 3"), sorted.
        rules: Vec<String>,
    },
    /// No, and why, in one line.
    Refuse {
        /// For the operator and the audit log.
        reason: String,
    },
}

/// Why rules are not accepted. Each names the first offending rule.
#[derive(Debug, thiserror::Error)]
pub enum CedarError {
    /// Too long.
    #[error("rules are at most {DOCUMENT_LIMIT} bytes")]
    Length,
    /// Rules that the engine is not given at all.
    #[error(transparent)]
    Rules(#[from] RulesError),
    /// Not Cedar.
    #[error("rule {rule} (line {line}) is not Cedar: {message}")]
    Syntax {
        /// Its number, from 1.
        rule: usize,
        /// The line it starts on, from 1.
        line: usize,
        /// What the engine says.
        message: String,
    },
    /// A name that is none.
    #[error("rule {rule} (line {line}): an @id is 1 to 64 printable ASCII characters that no other rule has")]
    Name {
        /// Its number, from 1.
        rule: usize,
        /// The line it starts on, from 1.
        line: usize,
    },
    /// Against the schema.
    #[error("{rule} does not fit the schema: {message}")]
    Schema {
        /// Its name.
        rule: String,
        /// What the engine says.
        message: String,
    },
    /// The schema in this program is broken.
    #[error("the built-in schema can't be read: {0}")]
    BuiltIn(String),
    /// No thread to parse on.
    #[error("no thread to parse rules on")]
    Thread(#[source] io::Error),
    /// The engine panicked.
    #[error("the rules broke the Cedar engine; nothing was changed")]
    Engine,
}

/// Decides, also where a customer has no policy: that means no.
pub fn decide(policy: Option<&CedarPolicy>, question: &Question<'_>) -> Verdict {
    match policy {
        Some(policy) => policy.decide(question),
        None => refuse("the customer has no policy".into()),
    }
}

impl CedarPolicy {
    /// Reads rules and checks them against the schema. Text without a rule is accepted: it permits nothing.
    pub fn parse(rules: &str) -> Result<Self, CedarError> {
        if rules.len() > DOCUMENT_LIMIT {
            return Err(CedarError::Length);
        }
        let cut = rules::cut(rules)?;
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("policy".into()).stack_size(PARSE_STACK);
            let parsing = thread.spawn_scoped(scope, || Self::read(&cut)).map_err(CedarError::Thread)?;
            parsing.join().unwrap_or(Err(CedarError::Engine))
        })
    }

    fn read(cut: &[Rule<'_>]) -> Result<Self, CedarError> {
        let [mut vms, mut volumes] = [Rules::of(SCHEMAS[0])?, Rules::of(SCHEMAS[1])?];
        let mut all = PolicySet::new();
        for rule in cut {
            let named = CedarError::Name { rule: rule.number, line: rule.line };
            let rule = read_rule(rule)?;
            all.add(rule.clone()).map_err(|_| named)?;
            let fits = [vms.take(&rule), volumes.take(&rule)];
            if let [Err(of_vms), Err(of_volumes)] = fits {
                // Which vocabulary was meant, the action tells.
                return Err(if names_volumes(&rule) { of_volumes } else { of_vms });
            }
        }
        Ok(Self { vms, volumes })
    }

    /// Decides one question. Whatever goes wrong on the way means no.
    pub fn decide(&self, question: &Question<'_>) -> Verdict {
        if question.operation.class() == OperationClass::Free {
            return refuse(format!("{} is free: no rule decides it", question.operation));
        }
        let asked = Asked {
            operation: question.operation.name(),
            object: format!("VM {}", question.vm),
            action: question.action(),
            restricted: question.operation.class() == OperationClass::Restricted,
        };
        self.vms.decide(&asked, question.for_engine(&self.vms.schema))
    }

    /// Decides one question about a volume. Whatever goes wrong on the way means no.
    pub fn decide_volume(&self, question: &VolumeQuestion<'_>) -> Verdict {
        let asked = Asked {
            operation: question.operation.name(),
            object: format!("volume {}", question.volume),
            action: question.action(),
            restricted: true,
        };
        self.volumes.decide(&asked, question.for_engine(&self.volumes.schema))
    }
}

impl Rules {
    fn of(schema: &str) -> Result<Self, CedarError> {
        let (schema, _) = Schema::from_cedarschema_str(schema).map_err(|e| CedarError::BuiltIn(one_line(&e)))?;
        Ok(Self { schema, rules: PolicySet::new() })
    }

    /// Takes a rule in, if it fits.
    fn take(&mut self, rule: &Policy) -> Result<(), CedarError> {
        let alone = PolicySet::from_policies([rule.clone()]).map_err(|e| CedarError::BuiltIn(one_line(&e)))?;
        check(&Validator::new(self.schema.clone()), &alone)?;
        self.rules.add(rule.clone()).map_err(|e| CedarError::BuiltIn(one_line(&e)))
    }

    fn decide(&self, asked: &Asked<'_>, question: Result<(Request, Entities), String>) -> Verdict {
        if self.rules.is_empty() {
            return refuse("the customer's policy has no rule".into());
        }
        match question {
            Ok((request, entities)) => {
                let response = Authorizer::new().is_authorized(&request, &self.rules, &entities);
                self.verdict(asked, &response)
            }
            Err(reason) => refuse(format!("the policy can't be asked: {reason}")),
        }
    }

    fn verdict(&self, asked: &Asked<'_>, response: &Response) -> Verdict {
        if let Some(error) = response.diagnostics().errors().next() {
            return refuse(format!("the policy can't be evaluated: {}", one_line(error)));
        }
        let mut decisive: Vec<&PolicyId> = response.diagnostics().reason().collect();
        decisive.sort_unstable();
        let names = |ids: &[&PolicyId]| ids.iter().map(|id| id.to_string()).collect::<Vec<_>>();
        let Asked { operation, object, .. } = asked;
        if response.decision() == Decision::Deny {
            return refuse(match names(&decisive).first() {
                Some(rule) => format!("the policy forbids {operation} of {object} ({rule})"),
                None => format!("no rule of the policy permits {operation} of {object}"),
            });
        }
        if asked.restricted {
            let Ok(action) = &asked.action else {
                return refuse(format!("{operation} is not known to the policy"));
            };
            decisive.retain(|id| self.permits_by_name(id, action));
        }
        if decisive.is_empty() {
            return refuse(format!("no rule of the policy names {operation}, which is permitted by name only"));
        }
        Verdict::Permit { rules: names(&decisive) }
    }

    /// Whether a rule is a permission whose scope names the operation itself.
    fn permits_by_name(&self, id: &PolicyId, action: &EntityUid) -> bool {
        self.rules.policy(id).is_some_and(|rule| {
            rule.effect() == Effect::Permit
                && match rule.action_constraint() {
                    ActionConstraint::Any => false,
                    ActionConstraint::In(actions) => actions.contains(action),
                    ActionConstraint::Eq(named) => named == *action,
                }
        })
    }
}

/// Whether a rule's scope names an operation on volumes.
fn names_volumes(rule: &Policy) -> bool {
    let is = |action: &EntityUid| action.id().unescaped().starts_with("volume.");
    match rule.action_constraint() {
        ActionConstraint::Any => false,
        ActionConstraint::In(actions) => actions.iter().any(is),
        ActionConstraint::Eq(action) => is(&action),
    }
}

fn read_rule(rule: &Rule<'_>) -> Result<Policy, CedarError> {
    let Rule { number, line, text } = *rule;
    let default = PolicyId::new(format!("rule {number}"));
    let read = Policy::parse(Some(default), text);
    let read = read.map_err(|e| CedarError::Syntax { rule: number, line, message: one_line(&e) })?;
    match read.annotation("id") {
        None => Ok(read),
        Some(name) if is_name(name) => Ok(read.new_id(PolicyId::new(name))),
        Some(_) => Err(CedarError::Name { rule: number, line }),
    }
}

fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|b| (b' '..=b'~').contains(&b))
}

/// Refuses what the strict validator refuses, and names or strings that look like others. A rule that can never apply is
/// accepted.
fn check(validator: &Validator, rules: &PolicySet) -> Result<(), CedarError> {
    let result = validator.validate(rules, ValidationMode::Strict);
    let refused = |id: &PolicyId, message: String| {
        let said = message.split_once("`, ").map_or(message.clone(), |(_, rest)| rest.to_owned());
        Err(CedarError::Schema { rule: id.to_string(), message: said })
    };
    if let Some(error) = result.validation_errors().next() {
        return refused(error.policy_id(), one_line(error));
    }
    let odd = |w: &&ValidationWarning| !matches!(w, ValidationWarning::ImpossiblePolicy(_));
    match result.validation_warnings().find(odd) {
        Some(warning) => refused(warning.policy_id(), one_line(warning)),
        None => Ok(()),
    }
}

fn refuse(reason: String) -> Verdict {
    Verdict::Refuse { reason }
}

#[cfg(test)]
mod tests;
