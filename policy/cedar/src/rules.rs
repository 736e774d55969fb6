//! Rules as text: cut at their semicolons, with every bound checked before the engine sees them. Cedar's parser, checker,
//! evaluator and destructors recurse over a rule, so its depth is bounded here: by its brackets and `if`s, and, since a chain of
//! operators is a tree as deep as the chain is long, by its operators.

use std::fmt::Display;

/// The most rules.
const RULES: usize = 1024;

/// The deepest nesting of brackets.
const DEPTH: usize = 24;

/// The most `if`s in one rule.
const IFS: usize = 24;

/// The most operators, accesses and calls in one rule.
const OPERATORS: usize = 512;

/// One rule, with its semicolon.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule<'a> {
    /// From 1.
    pub(crate) number: usize,
    /// Where its text starts, from 1; comments before it counted in.
    pub(crate) line: usize,
    pub(crate) text: &'a str,
}

/// Rules that the engine is not given.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RulesError {
    /// Too many of them.
    #[error("a policy has at most {RULES} rules")]
    TooMany,
    /// Text after the last semicolon.
    #[error("line {0}: a rule ends with a semicolon")]
    Unfinished(usize),
    /// A string that does not end, or with a backslash at a line's end.
    #[error("line {0}: a string is not closed")]
    String(usize),
    /// Brackets that don't match.
    #[error("line {0}: a bracket has no partner in its rule")]
    Bracket(usize),
    /// Brackets or `if`s too deep.
    #[error("line {0}: rules nest at most {DEPTH} brackets and hold at most {IFS} 'if's")]
    Depth(usize),
    /// A rule too long to be evaluated safely.
    #[error("line {0}: a rule has at most {OPERATORS} operators; split it in several")]
    Operators(usize),
    /// A character that could hide what a rule says.
    #[error("line {0}: rules hold no control or text-direction characters")]
    Hidden(usize),
}

/// Cuts `text` into its rules.
pub(crate) fn cut(text: &str) -> Result<Vec<Rule<'_>>, RulesError> {
    let mut scan = Scan::new(text);
    let mut rules = Vec::new();
    while let Some(rule) = scan.next_rule(rules.len() + 1)? {
        if rules.len() == RULES {
            return Err(RulesError::TooMany);
        }
        rules.push(rule);
    }
    Ok(rules)
}

/// A message in one line of at most 300 characters.
pub(crate) fn one_line(message: &dyn Display) -> String {
    let text = message.to_string();
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(300).collect()
}

/// Reads tokens as Cedar does, as far as needed to find where rules end and how deep they are.
struct Scan<'a> {
    text: &'a str,
    at: usize,
    line: usize,
}

/// What was counted of one rule.
#[derive(Default)]
struct Counts {
    open: Vec<u8>,
    ifs: usize,
    operators: usize,
    anything: bool,
}

impl<'a> Scan<'a> {
    fn new(text: &'a str) -> Self {
        Self { text, at: 0, line: 1 }
    }

    fn next_rule(&mut self, number: usize) -> Result<Option<Rule<'a>>, RulesError> {
        let (start, mut line) = (self.at, self.line);
        let mut counts = Counts::default();
        while let Some(c) = self.peek()? {
            if !counts.anything && !c.is_whitespace() && !self.rest().starts_with("//") {
                line = self.line;
            }
            match c {
                '"' => self.string()?,
                '/' if self.rest().starts_with("//") => {
                    self.comment()?;
                    continue;
                }
                c if c == '_' || c.is_ascii_alphanumeric() => counts.word(self.word(), self.line)?,
                ';' => {
                    self.advance(c);
                    if !counts.open.is_empty() {
                        return Err(RulesError::Bracket(self.line));
                    }
                    return Ok(Some(Rule { number, line, text: &self.text[start..self.at] }));
                }
                c => {
                    self.advance(c);
                    counts.symbol(c, self.line)?;
                    if c.is_whitespace() {
                        continue;
                    }
                }
            }
            counts.anything = true;
        }
        if counts.anything { Err(RulesError::Unfinished(line)) } else { Ok(None) }
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Result<Option<char>, RulesError> {
        let next = self.rest().chars().next();
        match next {
            Some('\n' | '\r' | '\t') => Ok(next),
            Some(c) if c.is_control() || is_direction(c) => Err(RulesError::Hidden(self.line)),
            _ => Ok(next),
        }
    }

    fn advance(&mut self, c: char) {
        self.at += c.len_utf8();
        self.line += usize::from(c == '\n');
    }

    fn word(&mut self) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|c: char| c != '_' && !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    fn comment(&mut self) -> Result<(), RulesError> {
        while let Some(c) = self.peek()? {
            if matches!(c, '\n' | '\r') {
                break;
            }
            self.advance(c);
        }
        Ok(())
    }

    fn string(&mut self) -> Result<(), RulesError> {
        let started = self.line;
        self.advance('"');
        while let Some(c) = self.peek()? {
            self.advance(c);
            match c {
                '"' => return Ok(()),
                '\\' => match self.peek()? {
                    None | Some('\n') => return Err(RulesError::String(started)),
                    Some(escaped) => self.advance(escaped),
                },
                _ => {}
            }
        }
        Err(RulesError::String(started))
    }
}

impl Counts {
    fn word(&mut self, word: &str, line: usize) -> Result<(), RulesError> {
        match word {
            "if" => self.ifs += 1,
            "in" | "has" | "like" | "is" => self.operator(line)?,
            _ => {}
        }
        if self.ifs > IFS { Err(RulesError::Depth(line)) } else { Ok(()) }
    }

    fn symbol(&mut self, c: char, line: usize) -> Result<(), RulesError> {
        match c {
            '(' | '[' | '{' => {
                self.open.push(c as u8);
                self.operator(line)?;
            }
            ')' | ']' | '}' => {
                let partner = match c {
                    ')' => b'(',
                    ']' => b'[',
                    _ => b'{',
                };
                if self.open.pop() != Some(partner) {
                    return Err(RulesError::Bracket(line));
                }
            }
            '.' | '|' | '&' | '+' | '-' | '*' | '/' | '%' | '!' | '<' | '>' | '=' => self.operator(line)?,
            _ => {}
        }
        if self.open.len() > DEPTH { Err(RulesError::Depth(line)) } else { Ok(()) }
    }

    /// Operators of two characters count twice; the bound is ample.
    fn operator(&mut self, line: usize) -> Result<(), RulesError> {
        self.operators += 1;
        if self.operators > OPERATORS { Err(RulesError::Operators(line)) } else { Ok(()) }
    }
}

/// Characters that make a text read in another order than it stands (Unicode, UAX 9).
fn is_direction(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{061c}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(rules: &str) -> Vec<(usize, String)> {
        cut(rules).expect("bounded").iter().map(|r| (r.line, r.text.trim().to_owned())).collect()
    }

    #[test]
    fn rules_are_cut_at_semicolons_that_no_string_or_comment_holds() {
        assert_eq!(texts(" \n// nothing; here\n"), []);
        let found = texts("a;\n// b;\n\n@id(\"x;\\\";\")\nc\n; // tail");
        assert_eq!(found, [(1, "a;".to_owned()), (4, "// b;\n\n@id(\"x;\\\";\")\nc\n;".to_owned())]);
    }

    #[test]
    fn what_could_overflow_or_hide_is_refused() {
        let refused = |text: &str| cut(text).map(|r| r.len()).expect_err("refused");
        assert_eq!(refused("permit"), RulesError::Unfinished(1));
        assert_eq!(refused("\n\"a"), RulesError::String(2));
        assert_eq!(refused("\"a\\\n\";"), RulesError::String(1));
        assert_eq!(refused("(];"), RulesError::Bracket(1));
        assert_eq!(refused("(;"), RulesError::Bracket(1));
        assert_eq!(refused(&"(".repeat(DEPTH + 1)), RulesError::Depth(1));
        assert_eq!(refused(&"if ".repeat(IFS + 1)), RulesError::Depth(1));
        assert_eq!(refused(&"!".repeat(OPERATORS + 1)), RulesError::Operators(1));
        assert_eq!(refused(&";".repeat(RULES + 1)), RulesError::TooMany);
        assert_eq!(refused("// \u{202e}"), RulesError::Hidden(1));
        assert_eq!(refused("\"\0\""), RulesError::Hidden(1));
    }
}
